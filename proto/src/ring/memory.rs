//! The mapped region that a client and the broker share, and the only unsafe code of this crate.
//!
//! The other side may write to every byte of it at any time, so nothing here is ever a `&[u8]`:
//! single words are atomics, and payloads are copied word by word with relaxed atomic accesses,
//! bounds-checked against the length that was verified when the region was mapped. What is copied
//! out may be anything; that is for the caller to judge, on its copy.
//!
//! A region cannot shrink below the mapping (SIGBUS, E1): it is sealed by the broker that made it,
//! and one that comes from elsewhere is mapped only after a look at its seals, size and file
//! system. `PUNCH_HOLE` still zeroes it at any time (E1b); zeros are no record.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{
    FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate,
    memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use rustix::thread::futex;

pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of a word, to which everything in a region is aligned.
pub(super) const WORD: usize = size_of::<u64>();

/// Of tmpfs, on which memfds live (statfs(2)).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The seals of a region: its size is fixed, and so are its seals.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Set besides by a kernel that was asked for a region without execute permission (Linux 6.3).
const SEAL_EXEC: SealFlags = SealFlags::from_bits_retain(0x20);

/// A mapped region.
#[derive(Debug)]
pub struct Memory {
    map: MmapRaw,
}

/// Why a descriptor is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum NotMapped {
    /// Its size could change, or its seals could.
    #[error("it has seals {found:#x} instead of {:#x}", SEALS.bits())]
    Seals {
        /// The seals it has.
        found: u32,
    },
    /// It is not a file in memory.
    #[error("it is not a memfd: {0}")]
    NotMemory(&'static str),
    /// It has another size.
    #[error("it has {found} bytes instead of {wanted}")]
    Size {
        /// What was announced.
        wanted: usize,
        /// What it has.
        found: u64,
    },
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl Memory {
    /// Makes a zeroed region of `bytes`, sealed, and maps it; the descriptor is for the other side.
    ///
    /// # Errors
    /// As memfd_create(2), ftruncate(2), fcntl(2) and mmap(2).
    pub fn create(bytes: usize) -> io::Result<(Memory, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let name = "poolbroker-ring";
        let fd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            // Unknown before Linux 6.3.
            Err(Errno::INVAL) => memfd_create(name, flags)?,
            made => made?,
        };
        ftruncate(&fd, bytes as u64)?;
        fcntl_add_seals(&fd, SEALS)?;
        Ok((Memory::map_verified(fd.as_fd(), bytes)?, fd))
    }

    /// Maps a region that this process did not make, after a look at everything that could make
    /// touching it dangerous: seals, type, exact size, file system (M2).
    ///
    /// # Errors
    /// Any [`NotMapped`].
    pub fn map(fd: BorrowedFd<'_>, bytes: usize) -> Result<Memory, NotMapped> {
        let seals = fcntl_get_seals(fd).map_err(|_| NotMapped::NotMemory("it takes no seals"))?;
        if seals != SEALS && seals != SEALS | SEAL_EXEC {
            return Err(NotMapped::Seals { found: seals.bits() });
        }
        let stat = fstat(fd).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(NotMapped::NotMemory("it is not a regular file"));
        }
        let found = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if found != bytes as u64 {
            return Err(NotMapped::Size { wanted: bytes, found });
        }
        // A hugetlb memfd passes everything above, and touching it can fail (E1f).
        let stat = fstatfs(fd).map_err(io::Error::from)?;
        if u64::try_from(stat.f_type) != Ok(TMPFS_MAGIC) {
            return Err(NotMapped::NotMemory("it does not lie on tmpfs"));
        }
        Ok(Memory::map_verified(fd, bytes)?)
    }

    fn map_verified(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<Memory> {
        use std::os::fd::AsRawFd;
        Ok(Memory { map: MmapOptions::new().len(bytes).map_raw(fd.as_raw_fd())? })
    }

    /// Bytes of the region.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// The word `at` bytes from the start.
    #[inline]
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        let place = self.place(at, WORD).cast();
        // SAFETY: `place` lies inside the mapping for WORD bytes and is aligned to them; the
        // mapping lives as long as `self`, and what lies in it is only ever touched atomically.
        unsafe { AtomicU64::from_ptr(place) }
    }

    /// The half word `at` bytes from the start, which is a multiple of a word's size.
    #[inline]
    pub(super) fn half(&self, at: usize) -> &AtomicU32 {
        let place = self.place(at, WORD).cast();
        // SAFETY: as in `word`; a half word has half the size and alignment.
        unsafe { AtomicU32::from_ptr(place) }
    }

    /// The words from `at` on.
    #[inline]
    pub(super) fn load<const WORDS: usize>(&self, at: usize) -> [u64; WORDS] {
        let place = self.place(at, WORDS * WORD).cast::<u64>();
        std::array::from_fn(|index| {
            // SAFETY: `index` is less than `WORDS`, for which `place` was checked; see `word`.
            let word = unsafe { AtomicU64::from_ptr(place.add(index)) };
            // ORDER: relaxed; the acquire load that showed the position came before.
            word.load(Ordering::Relaxed)
        })
    }

    /// Stores words from `at` on.
    #[inline]
    pub(super) fn store<const WORDS: usize>(&self, at: usize, words: [u64; WORDS]) {
        let place = self.place(at, WORDS * WORD).cast::<u64>();
        for (index, value) in words.into_iter().enumerate() {
            // SAFETY: `index` is less than `WORDS`, for which `place` was checked; see `word`.
            let word = unsafe { AtomicU64::from_ptr(place.add(index)) };
            // ORDER: relaxed; the release store that publishes the position comes after.
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Copies `bytes` to `at`; the last word is filled up with zeros.
    #[inline]
    pub(super) fn copy_in(&self, at: usize, bytes: &[u8]) {
        let words = bytes.len().div_ceil(WORD);
        let place = self.place(at, words * WORD).cast::<u64>();
        let (whole, rest) = bytes.as_chunks::<WORD>();
        let store = |index: usize, word: [u8; WORD]| {
            // SAFETY: `index` is less than `words`, for which `place` was checked; see `word`.
            let word_there = unsafe { AtomicU64::from_ptr(place.add(index)) };
            // ORDER: relaxed; the release store that publishes the position comes after.
            word_there.store(u64::from_ne_bytes(word), Ordering::Relaxed);
        };
        for (index, word) in whole.iter().enumerate() {
            store(index, *word);
        }
        if !rest.is_empty() {
            let mut last = [0; WORD];
            last[..rest.len()].copy_from_slice(rest);
            store(whole.len(), last);
        }
    }

    /// Appends the `len` bytes at `at` to `out`.
    #[inline]
    pub(super) fn copy_out(&self, at: usize, len: usize, out: &mut Vec<u8>) {
        let words = len.div_ceil(WORD);
        let place = self.place(at, words * WORD).cast::<u64>();
        out.reserve(words * WORD);
        let before = out.len();
        // SAFETY: `words * WORD` bytes behind the vector's length were reserved, `place` was
        // checked for as many, and the two do not overlap, since the mapping belongs to no
        // allocation. All `len` bytes are initialized before the length says so.
        unsafe {
            let to = out.as_mut_ptr().add(before).cast::<u64>();
            for index in 0..words {
                // ORDER: relaxed; the acquire load that showed the position came before.
                let word = AtomicU64::from_ptr(place.add(index)).load(Ordering::Relaxed);
                to.add(index).write_unaligned(word);
            }
            out.set_len(before + len);
        }
    }

    /// Waits while the half word at `at` is `expected`, at most `timeout`; wakes up for nothing,
    /// too. The futex is shared between processes (futex(2)).
    pub(super) fn futex_wait(&self, at: usize, expected: u32, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| futex::Timespec::try_from(timeout).ok());
        // Every error is a reason to look again: another value, a signal, the timeout.
        let _ = futex::wait(self.half(at), futex::Flags::empty(), expected, timeout.as_ref());
    }

    /// Wakes one that waits at `at`.
    pub(super) fn futex_wake(&self, at: usize) {
        // Cannot fail for a mapped, aligned address.
        let _ = futex::wake(self.half(at), futex::Flags::empty(), 1);
    }

    #[inline]
    fn place(&self, at: usize, bytes: usize) -> *mut u8 {
        let end = at.checked_add(bytes);
        if !at.is_multiple_of(WORD) || end.is_none_or(|end| end > self.map.len()) {
            outside(at, bytes);
        }
        // SAFETY: `at` is at most the length of the mapping.
        unsafe { self.map.as_mut_ptr().add(at) }
    }
}

/// Apart from the check, which stands in every access.
#[cold]
#[inline(never)]
#[allow(clippy::panic, reason = "positions are checked before: this is a defect of the ring")]
fn outside(at: usize, bytes: usize) -> ! {
    panic!("{bytes} bytes at {at} lie outside of the region")
}

/// A byte that a forked child finds wiped: the child shares every mapping and descriptor with its
/// parent, and two producers of one ring would destroy it. Reading it costs a load; asking for the
/// process id costs a system call.
#[derive(Debug)]
pub struct ForkMark {
    map: *mut u8,
}

// SAFETY: the page is written once, before the mark exists, and only read from then on.
unsafe impl Send for ForkMark {}
// SAFETY: as above.
unsafe impl Sync for ForkMark {}

const MARK: u8 = 1;
const MARK_BYTES: usize = 4096;

impl ForkMark {
    /// Marks this process.
    ///
    /// # Errors
    /// As mmap(2) and madvise(2), MADV_WIPEONFORK (Linux 4.14).
    pub fn set() -> io::Result<ForkMark> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let (anywhere, flags) = (std::ptr::null_mut(), MapFlags::PRIVATE);
        // SAFETY: a new private mapping that the kernel places touches nothing that is there.
        let map = unsafe { mmap_anonymous(anywhere, MARK_BYTES, access, flags)? };
        let mark = ForkMark { map: map.cast() };
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(map, MARK_BYTES, Advice::LinuxWipeOnFork)? };
        // SAFETY: the mapping is writable, and nobody else knows of it yet.
        unsafe { mark.map.write(MARK) };
        Ok(mark)
    }

    /// Whether this process is a child forked since the mark was set.
    #[must_use]
    pub fn is_in_child(&self) -> bool {
        // SAFETY: the mapping is readable as long as `self` lives. Volatile, because the kernel
        // changes the byte behind the compiler's back.
        unsafe { self.map.read_volatile() != MARK }
    }
}

impl Drop for ForkMark {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own, and nobody holds a reference into it.
        let unmapped = unsafe { rustix::mm::munmap(self.map.cast(), MARK_BYTES) };
        debug_assert!(unmapped.is_ok(), "the mapping was made with this length");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::Arc;

    const BYTES: usize = 8192;

    fn memfd(flags: MemfdFlags, bytes: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", flags | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn bytes_come_out_as_they_went_in_at_any_length() {
        let (memory, _fd) = Memory::create(BYTES).unwrap();
        for len in [0, 1, 7, 8, 9, 64, 1000] {
            let bytes: Vec<u8> = (0..len).map(|at| at as u8 ^ 0x5a).collect();
            memory.copy_in(BYTES - 1000, &bytes);
            let mut out = b"before".to_vec();
            memory.copy_out(BYTES - 1000, len, &mut out);
            assert_eq!(out, [b"before", bytes.as_slice()].concat());
        }
    }

    #[test]
    #[should_panic(expected = "outside of the region")]
    fn no_access_goes_beyond_the_end() {
        let (memory, _fd) = Memory::create(BYTES).unwrap();
        memory.copy_in(BYTES - 8, &[0; 9]);
    }

    #[test]
    fn what_one_mapping_writes_another_reads_and_neither_can_resize() {
        let (ours, fd) = Memory::create(BYTES).unwrap();
        let theirs = Memory::map(fd.as_fd(), BYTES).unwrap();
        ours.copy_in(4096, b"shared");
        let mut out = Vec::new();
        theirs.copy_out(4096, 6, &mut out);
        assert_eq!(out, b"shared");
        assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
        assert!(fcntl_add_seals(&fd, SealFlags::WRITE).is_err());
    }

    #[test]
    fn what_could_shrink_is_huge_or_is_no_memfd_is_not_mapped() {
        let all = SEALS;
        let refused = |fd: OwnedFd| Memory::map(fd.as_fd(), BYTES).map(|_| ()).unwrap_err();
        let unsealed = memfd(MemfdFlags::empty(), BYTES as u64, SealFlags::empty());
        assert!(matches!(refused(unsealed), NotMapped::Seals { found: 0 }));
        let half = memfd(MemfdFlags::empty(), BYTES as u64, SealFlags::SHRINK | SealFlags::SEAL);
        assert!(matches!(refused(half), NotMapped::Seals { .. }));
        let more = memfd(MemfdFlags::empty(), BYTES as u64, all | SealFlags::FUTURE_WRITE);
        assert!(matches!(refused(more), NotMapped::Seals { .. }));
        for bytes in [BYTES as u64 - 4096, BYTES as u64 + 4096, 0] {
            let other = memfd(MemfdFlags::empty(), bytes, all);
            assert!(matches!(refused(other), NotMapped::Size { .. }));
        }
        for path in ["/proc/self/exe", "/dev/zero", "/"] {
            assert!(matches!(refused(File::open(path).unwrap().into()), NotMapped::NotMemory(_)));
        }
        let shm = tempfile::tempfile_in("/dev/shm").unwrap();
        shm.set_len(BYTES as u64).unwrap();
        assert!(matches!(refused(shm.into()), NotMapped::Seals { .. }));
        let (_, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(refused(socket.into()), NotMapped::NotMemory(_)));
        // A huge page is 2 MiB at least, so the size is asked for accordingly.
        let huge = memfd(MemfdFlags::HUGETLB, 2 << 20, all);
        let huge = Memory::map(huge.as_fd(), 2 << 20).map(|_| ()).unwrap_err();
        assert!(matches!(huge, NotMapped::NotMemory(_)), "{huge}");
    }

    #[test]
    fn a_forked_child_finds_the_mark_wiped_and_its_parent_does_not() {
        use std::os::unix::process::CommandExt;

        let mark = Arc::new(ForkMark::set().unwrap());
        let in_child = Arc::clone(&mark);
        let mut command = std::process::Command::new("true");
        let look = move || match in_child.is_in_child() {
            true => Ok(()),
            false => Err(io::Error::from(Errno::PERM)),
        };
        // SAFETY: between fork and exec the closure reads one byte and allocates nothing.
        unsafe { command.pre_exec(look) };
        assert!(command.status().unwrap().success());
        assert!(!mark.is_in_child());
    }

    #[test]
    fn a_futex_of_one_mapping_wakes_another() {
        let (ours, fd) = Memory::create(BYTES).unwrap();
        let theirs = Memory::map(fd.as_fd(), BYTES).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while theirs.half(64).load(Ordering::Acquire) == 0 {
                    theirs.futex_wait(64, 0, None);
                }
            });
            ours.half(64).store(1, Ordering::Release);
            ours.futex_wake(64);
        });
    }
}
