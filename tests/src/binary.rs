//! The broker's executable, built when a test first needs it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The path of the `poolbroker` executable: `$POOLBROKER_BIN`, else the workspace's own, built now
/// in the profile in which the test runs.
///
/// # Panics
/// When it cannot be built.
pub fn poolbroker_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("POOLBROKER_BIN") {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

/// The root of the workspace, whose files some tests read.
pub fn workspace_root() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("tests/ stands in the workspace")
}

fn build() -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    // --workspace selects the same features of the dependencies as `cargo test --workspace` does,
    // so that what it built is used again.
    command
        .args(["build", "--workspace", "--bin", "poolbroker"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace_root())
        .stdin(Stdio::null());
    if is_release() {
        command.arg("--release");
    }
    let output = command.output().expect("cargo can be started");
    assert!(
        output.status.success(),
        "the broker does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "poolbroker")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo names the executable that it built")
}

fn is_release() -> bool {
    env::current_exe()
        .is_ok_and(|path| path.components().any(|component| component.as_os_str() == "release"))
}
