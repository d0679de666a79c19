//! FIFOs in the runtime directory: `echo x > NAME.fifo`.
//!
//! Opened for reading and writing, so that writers come and go without an end of file (E7; fifo(7)).
//! A path that is there already is taken only if it is a FIFO of our own; anything else is left
//! as it is and refused with what to do about it (O3, M16, M17).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat};
use nix::unistd::{Gid, fchown, geteuid, mkfifo};

/// Why a FIFO cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FifoError {
    /// Something else has its name.
    #[error(
        "{path:?} is {what}, not a FIFO; a script may have written to it while no broker ran: \
         look at it, then remove it"
    )]
    NotAFifo {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another user made it.
    #[error("{path:?} belongs to uid {uid}, not to the broker's own; remove it")]
    Foreign {
        /// The path.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The kernel refuses.
    #[error("the FIFO {path:?} cannot be opened: {cause}")]
    Kernel {
        /// The path.
        path: PathBuf,
        /// Its error.
        cause: Errno,
    },
}

/// Opens the FIFO at `path`, making it if there is nothing, with exactly that mode and group.
pub fn open_fifo(path: &Path, mode: u32, group: Option<Gid>) -> Result<OwnedFd, FifoError> {
    let kernel = |cause| FifoError::Kernel { path: path.to_path_buf(), cause };
    // Made with no permissions for others; widened below through the descriptor.
    match mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(cause) => return Err(kernel(cause)),
    }
    // What is there is looked at through a descriptor that opens nothing of it.
    let look = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(kernel)?;
    let found = fstat(&look).map_err(kernel)?;
    if let Some(what) = not_a_fifo(SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()))
    {
        return Err(FifoError::NotAFifo { path: path.to_path_buf(), what });
    }
    if found.st_uid != geteuid().as_raw() {
        return Err(FifoError::Foreign { path: path.to_path_buf(), uid: found.st_uid });
    }
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fifo = open(path, flags, Mode::empty()).map_err(kernel)?;
    let opened = fstat(&fifo).map_err(kernel)?;
    if (opened.st_dev, opened.st_ino) != (found.st_dev, found.st_ino) {
        return Err(kernel(Errno::ESTALE));
    }
    if group.is_some() {
        fchown(&fifo, None, group).map_err(kernel)?;
    }
    fchmod(&fifo, Mode::from_bits_truncate(mode)).map_err(kernel)?;
    Ok(fifo)
}

fn not_a_fifo(kind: SFlag) -> Option<&'static str> {
    match kind {
        SFlag::S_IFIFO => None,
        SFlag::S_IFREG => Some("a regular file"),
        SFlag::S_IFDIR => Some("a directory"),
        SFlag::S_IFLNK => Some("a symbolic link"),
        SFlag::S_IFSOCK => Some("a socket"),
        _ => Some("a device"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_fifo_is_made_with_its_mode_and_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.fifo");
        for mode in [0o622, 0o600] {
            open_fifo(&path, mode, None).unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, mode);
        }
    }

    #[test]
    fn what_is_no_fifo_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "data of a script").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (path, says) in [(&file, "a regular file"), (&link, "a symbolic link")] {
            let refused = open_fifo(path, 0o600, None).unwrap_err().to_string();
            assert!(refused.contains(says) && refused.contains("remove it"), "{refused}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "data of a script");
    }
}
