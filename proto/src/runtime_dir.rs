//! The directory in which a broker and its clients meet, and the names in it.

use std::path::{Path, PathBuf};

/// The longest path of a Unix socket in bytes: `sun_path` less its NUL (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A runtime directory: where the sockets and FIFOs of one broker are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeDir(PathBuf);

/// Why no runtime directory is known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeDirError {
    /// Neither given nor derivable.
    #[error("no runtime directory: XDG_RUNTIME_DIR is not set; give one with --runtime-dir DIR")]
    Unknown,
    /// The names in it would not fit the address of a Unix socket.
    #[error(
        "the path {path:?} has {bytes} bytes, and a Unix socket takes at most \
         {SOCKET_PATH_BYTES_MAX}; choose a shorter runtime directory"
    )]
    TooLong {
        /// The offending path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
}

impl RuntimeDir {
    /// The runtime directory `given`, else `$XDG_RUNTIME_DIR/poolbroker`, as root
    /// `/run/poolbroker`.
    ///
    /// # Errors
    /// [`RuntimeDirError`]: none can be derived, or its paths are too long for a socket.
    pub fn resolve(given: Option<&Path>) -> Result<Self, RuntimeDirError> {
        let root = || rustix::process::geteuid().is_root();
        let xdg = || std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty());
        let dir = match given {
            Some(dir) => dir.to_path_buf(),
            None if root() => PathBuf::from("/run/poolbroker"),
            None => PathBuf::from(xdg().ok_or(RuntimeDirError::Unknown)?).join("poolbroker"),
        };
        let dir = RuntimeDir(dir);
        let longest = dir.client_socket();
        let bytes = longest.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(RuntimeDirError::TooLong { path: longest, bytes });
        }
        Ok(dir)
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where clients connect.
    #[must_use]
    pub fn client_socket(&self) -> PathBuf {
        self.0.join("broker.sock")
    }

    /// Where `status` asks.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.0.join("admin.sock")
    }

    /// The file whose lock makes a broker the only one of this directory.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.0.join("broker.lock")
    }

    /// The FIFO of an upstream.
    #[must_use]
    pub fn fifo(&self, upstream: &str) -> PathBuf {
        self.0.join(format!("{upstream}.fifo"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_too_long_for_a_socket_is_refused() {
        let long = PathBuf::from(format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX)));
        let refused = RuntimeDir::resolve(Some(&long));
        assert!(matches!(refused, Err(RuntimeDirError::TooLong { .. })), "{refused:?}");
        let longest = "/broker.sock".len();
        let fits = PathBuf::from(format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX - longest - 1)));
        assert!(RuntimeDir::resolve(Some(&fits)).is_ok());
    }
}
