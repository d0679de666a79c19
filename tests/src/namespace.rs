//! A test in namespaces of its own: network and mounts, so that ports, routes and names are its own.

use std::env;
use std::process::Command;

use crate::binary::poolbroker_binary;

const INSIDE: &str = "POOLBROKER_TEST_INSIDE_NAMESPACE";

/// Runs `body` where `setup`, a script, was run before: the test executable calls itself there by
/// the `name` of the test, which must be an ignored one. The loopback device is up.
///
/// Making the namespaces takes root, or a kernel that lets users do it.
pub fn inside(setup: &str, name: &str, body: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let script =
        format!("ip link set lo up && {setup} && exec \"$0\" --ignored --exact {name} --nocapture");
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    let status = unshare
        .args(["--net", "--mount", "sh", "-c", &script])
        .arg(env::current_exe().expect("a test knows its executable"))
        .env(INSIDE, "1")
        .env("POOLBROKER_BIN", poolbroker_binary())
        .status()
        .expect("unshare is installed");
    assert!(status.success(), "{name}, inside: {status}");
}
