//! The clocks of the benchmarks: monotonic time, which all processes share, and the CPU time of a
//! process by its own CPU clock, exact to nanoseconds and over all its threads, of this one or any
//! other (clock_getcpuclockid(3)).

use std::io;
use std::process::Child;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_getcpuclockid, clock_nanosleep};
use nix::unistd::Pid;

use crate::cli::exit::CommandError;

const NS_PER_S: u64 = 1_000_000_000;

/// Nanoseconds of monotonic time.
pub fn now_ns() -> u64 {
    read(ClockId::CLOCK_MONOTONIC).expect("every Linux has a monotonic clock")
}

/// Nanoseconds of CPU that this process has used, in user space and in the kernel.
pub fn own_cpu_ns() -> u64 {
    read(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("every process has a CPU clock")
}

/// Nanoseconds of CPU that this thread has used: a system call, but a short one.
pub fn thread_cpu_ns() -> u64 {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has a CPU clock")
}

/// Sleeps until that monotonic time, at once past it.
pub fn sleep_until(at_ns: u64) {
    let seconds = i64::try_from(at_ns / NS_PER_S).unwrap_or(i64::MAX);
    let rest = i64::try_from(at_ns % NS_PER_S).unwrap_or_default();
    let at = TimeSpec::new(seconds, rest);
    let flags = ClockNanosleepFlags::TIMER_ABSTIME;
    // A signal that does not end the process only makes it sleep again.
    while clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &at) == Err(Errno::EINTR) {}
}

/// The CPU clock of a child.
#[derive(Debug, Clone, Copy)]
pub struct CpuClock(ClockId);

impl CpuClock {
    /// The clock of a child that was not waited for yet.
    pub fn of(child: &Child) -> Result<Self, CommandError> {
        let pid = i32::try_from(child.id()).map_or(Pid::this(), Pid::from_raw);
        clock_getcpuclockid(pid).map(CpuClock).map_err(|error| no_clock(error.into()))
    }

    /// Nanoseconds of CPU that it has used.
    pub fn ns(self) -> Result<u64, CommandError> {
        read(self.0).map_err(no_clock)
    }
}

fn read(clock: ClockId) -> io::Result<u64> {
    let time = clock.now()?;
    let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
    Ok(seconds * NS_PER_S + u64::try_from(time.tv_nsec()).unwrap_or_default())
}

fn no_clock(error: io::Error) -> CommandError {
    CommandError::failed(format!("the CPU clock of a child cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_ends_at_its_time_and_costs_little_cpu() {
        let (start, cpu) = (now_ns(), own_cpu_ns());
        sleep_until(start + 2_000_000);
        assert!(now_ns() >= start + 2_000_000);
        assert!(own_cpu_ns() > cpu, "the clock runs");
        sleep_until(0);
    }
}
