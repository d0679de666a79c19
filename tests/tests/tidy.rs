//! The rules of the house that a reader of the source relies on, checked by reading the source.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::path::Path;

use poolbroker_tests::binary::workspace_root;

const CRATES: [&str; 5] = ["broker", "client-lib", "proto", "tests", "examples"];

/// Files of the broker that decide and never do: no sockets, no clock, no payload.
const PURE_FILES: [&str; 15] = [
    "pool",
    "balance",
    "coalesce",
    "credit",
    "ids",
    "inflight",
    "outbox",
    "quota",
    "separator",
    "session",
    "stats",
    "tagged",
    "timers",
    "waiting",
    "window",
];

/// What brings I/O into a file; addresses of std::net are data.
const IO_WORDS: [&str; 11] = [
    "nix::",
    "rustix::",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "net::*",
    "std::os",
    "std::fs",
    "std::io",
    "std::thread",
    "crossbeam",
];

const UNSAFE_FILES: [&str; 2] = ["proto/src/ring/memory.rs", "broker/src/upstream/sockopt.rs"];

const LINES_MAX: usize = 1400;

/// A Rust file, by its path from the root of the workspace.
struct Source {
    path: String,
    text: String,
}

/// A rule: what it forbids, and the lines of a file that break it.
type Rule = fn(&Source) -> Vec<String>;

const RULES: [(&str, Rule); 10] = [
    ("a file opens with a //! header", header_is_missing),
    ("a file has at most 1,400 lines", too_long),
    ("a file is named after its noun", named_after_nothing),
    ("only shard, control and the commands read the clock", clock_reads),
    ("only proto/src/message.rs names bincode", bincode_names),
    ("pure files import no I/O", io_in_pure_files),
    ("unsafe stands in two files, each time with its reason", unsafe_code),
    ("each atomic access names the partner of its order", atomics_without_order),
    ("channels are bounded", unbounded_channels),
    ("nothing is left to do later", things_left_to_do),
];

#[test]
fn no_file_breaks_a_rule_of_the_house() {
    let sources = sources();
    assert!(sources.len() > 20, "the source tree was not found");
    let broken: Vec<String> = RULES
        .iter()
        .flat_map(|(name, rule)| {
            let found = sources.iter().flat_map(rule);
            found.map(move |place| format!("{place}: {name}"))
        })
        .collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn each_rule_finds_what_it_forbids() {
    let long = format!("//! A header.\n{}", "\n".repeat(LINES_MAX));
    let late = concat!("//! A header.\n// TO", "DO: later\n");
    for (rule, path, text) in [
        (header_is_missing as Rule, "broker/src/pool.rs", "fn main() {}\n"),
        (too_long, "broker/src/pool.rs", &long),
        (named_after_nothing, "proto/src/utils.rs", "//! A header.\n"),
        (clock_reads, "broker/src/pool.rs", "let now = Instant::now();\n"),
        (clock_reads, "broker/src/session.rs", "let now = std::time::SystemTime::now();\n"),
        (bincode_names, "proto/src/frame.rs", "let body = bincode::encode(x);\n"),
        (io_in_pure_files, "broker/src/quota.rs", "use nix::unistd::Uid;\n"),
        (io_in_pure_files, "broker/src/pool.rs", "use std::net::TcpStream;\n"),
        (unsafe_code, "broker/src/shard.rs", "// SAFETY: no.\nunsafe { x() }\n"),
        (unsafe_code, "broker/src/upstream/sockopt.rs", "\nunsafe { x() }\n"),
        (atomics_without_order, "proto/src/ring/x.rs", "//! H.\nx.load(Ordering::Relaxed);\n"),
        (unbounded_channels, "broker/src/control.rs", "let (a, b) = unbounded();\n"),
        (things_left_to_do, "broker/src/pool.rs", late),
    ] {
        let source = Source { path: path.to_owned(), text: text.to_owned() };
        assert_eq!(rule(&source).len(), 1, "{path}: {text}");
    }
}

#[test]
fn what_the_rules_allow_passes() {
    for (path, text) in [
        ("broker/src/shard.rs", "//! A header.\nlet now = Instant::now();\n"),
        ("broker/src/cli/demo.rs", "//! A header.\nlet now = Instant::now();\n"),
        ("broker/src/pool.rs", "//! H.\n#[cfg(test)]\nmod tests {\nInstant::now()\n}\n"),
        ("broker/src/pool.rs", "//! Says nothing of Instant::now() but this.\n"),
        (
            "broker/src/upstream/sockopt.rs",
            "//! A header.\n// SAFETY: the pointer is valid\n// for that long.\nunsafe { x() }\n",
        ),
        ("proto/src/message.rs", "//! A header.\nlet body = bincode::encode(x);\n"),
        ("broker/src/lib.rs", "//! A header.\n#![deny(unsafe_code)]\n"),
        ("proto/src/x.rs", "//! H.\n// ORDER: partner.\nx.load(Ordering::Relaxed);\n"),
    ] {
        let source = Source { path: path.to_owned(), text: text.to_owned() };
        for (name, rule) in RULES {
            assert_eq!(rule(&source), Vec::<String>::new(), "{name}: {text}");
        }
    }
}

#[test]
fn crates_without_unsafe_forbid_it() {
    for root in ["client-lib/src/lib.rs", "tests/src/lib.rs", "examples/src/lib.rs"] {
        let path = workspace_root().join(root);
        if let Ok(text) = fs::read_to_string(&path) {
            assert!(text.contains("#![forbid(unsafe_code)]"), "{root}");
        }
    }
}

#[test]
fn the_readme_needs_two_commands() {
    let readme = fs::read_to_string(workspace_root().join("README.md")).unwrap();
    for command in ["cargo run --release -- demo", "cargo test --workspace"] {
        assert!(readme.contains(command), "{command}");
    }
}

#[test]
fn every_example_says_what_it_shows_and_how_to_run_it() {
    let mut found = 0;
    for (path, text) in files_below(&workspace_root().join("examples")) {
        let opening = match path.rsplit_once('.') {
            Some((_, "rs")) if !path.ends_with("lib.rs") => "//!",
            Some((_, "sh")) => "#",
            _ => continue,
        };
        let header: Vec<&str> = text
            .lines()
            .skip_while(|line| line.starts_with("#!/"))
            .take_while(|line| line.starts_with(opening))
            .collect();
        assert!(!header.is_empty(), "{path} has no header");
        let header = header.join("\n");
        let says_how = header.contains("cargo run") || header.contains(&path);
        assert!(says_how, "{path} does not say how to run it");
        found += 1;
    }
    assert!(found >= 2, "{found} examples");
}

fn sources() -> Vec<Source> {
    let all = CRATES.iter().flat_map(|name| files_below(&workspace_root().join(name)));
    let rust = all.filter(|(path, _)| path.ends_with(".rs"));
    rust.map(|(path, text)| Source { path, text }).collect()
}

fn files_below(dir: &Path) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if let Ok(text) = fs::read_to_string(&path) {
            let relative = path.strip_prefix(workspace_root()).unwrap();
            files.push((relative.to_str().unwrap().to_owned(), text));
        }
    }
    files
}

fn header_is_missing(source: &Source) -> Vec<String> {
    match source.text.starts_with("//! ") {
        true => Vec::new(),
        false => vec![source.path.clone()],
    }
}

fn too_long(source: &Source) -> Vec<String> {
    match source.text.lines().count() {
        0..=LINES_MAX => Vec::new(),
        lines => vec![format!("{} ({lines} lines)", source.path)],
    }
}

fn named_after_nothing(source: &Source) -> Vec<String> {
    let stem = Path::new(&source.path).file_stem().unwrap();
    let empty = ["utils", "util", "common", "types", "traits", "helpers", "misc"];
    match empty.iter().any(|name| stem == *name) {
        true => vec![source.path.clone()],
        false => Vec::new(),
    }
}

fn clock_reads(source: &Source) -> Vec<String> {
    let may = ["broker/src/shard", "broker/src/cli/", "broker/src/control"];
    if !source.path.starts_with("broker/src/") || may.iter().any(|at| source.path.starts_with(at)) {
        return Vec::new();
    }
    lines_with(source, &["Instant::now", "SystemTime", "clock_gettime", ".elapsed()"])
}

fn bincode_names(source: &Source) -> Vec<String> {
    match source.path.as_str() {
        "proto/src/message.rs" => Vec::new(),
        path if path.starts_with("tests/") => Vec::new(),
        _ => lines_with(source, &["bincode::"]),
    }
}

fn io_in_pure_files(source: &Source) -> Vec<String> {
    let inside = source.path.strip_prefix("broker/src/").unwrap_or_default();
    let noun = inside.split(['/', '.']).next().unwrap_or_default();
    match PURE_FILES.contains(&noun) {
        true => lines_with(source, &IO_WORDS),
        false => Vec::new(),
    }
}

fn unsafe_code(source: &Source) -> Vec<String> {
    if source.path.starts_with("tests/") {
        // Its crate forbids it, and this file speaks of it.
        return Vec::new();
    }
    let lines: Vec<&str> = source.text.lines().collect();
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let is_unsafe = |line: &str| {
        let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
        !is_comment(line) && words.iter().any(|word| line.contains(word))
    };
    let explained = |number: usize| {
        let above = lines[..number].iter().rev();
        let mut comments = above.take_while(|line| is_comment(line));
        comments.any(|line| line.contains("SAFETY:"))
    };
    let allowed = UNSAFE_FILES.contains(&source.path.as_str());
    (0..lines.len())
        .filter(|number| is_unsafe(lines[*number]) && !(allowed && explained(*number)))
        .map(|number| format!("{}:{}", source.path, number + 1))
        .collect()
}

fn atomics_without_order(source: &Source) -> Vec<String> {
    // Models and tests order nothing that others rely on.
    let is_test =
        ["tests.rs", "model.rs", "hostile.rs"].iter().any(|end| source.path.ends_with(end));
    if source.path.starts_with("tests/") || is_test {
        return Vec::new();
    }
    let production = source.text.split("\nmod tests {").next().unwrap_or_default();
    let lines: Vec<&str> = production.lines().collect();
    let orders = ["::Relaxed", "::Acquire", "::Release", "::AcqRel", "::SeqCst"];
    // The reason stands above the statement, of which the access may be a later line.
    let explained = |number: usize| {
        lines[number.saturating_sub(6)..number].iter().any(|line| line.contains("ORDER:"))
    };
    let is_access = |line: &str| {
        let names_order = orders.iter().any(|order| line.contains(&["Ordering", order].concat()));
        names_order && !line.starts_with("use ")
    };
    (0..lines.len())
        .filter(|number| is_access(lines[*number]))
        .filter(|number| !explained(*number))
        .map(|number| format!("{}:{}", source.path, number + 1))
        .collect()
}

fn unbounded_channels(source: &Source) -> Vec<String> {
    match source.path.starts_with("tests/") {
        true => Vec::new(),
        false => lines_with(source, &["unbounded(", "mpsc::channel("]),
    }
}

fn things_left_to_do(source: &Source) -> Vec<String> {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    let lines = source.text.lines().enumerate();
    lines
        .filter(|(_, line)| words.iter().any(|word| line.contains(word)))
        .map(|(number, _)| format!("{}:{}", source.path, number + 1))
        .collect()
}

/// The lines of code, not of comments or of the unit tests below, that contain one of `words`.
fn lines_with(source: &Source, words: &[&str]) -> Vec<String> {
    let production = source.text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = production.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .filter(|(_, line)| words.iter().any(|word| line.contains(word)))
        .map(|(number, _)| format!("{}:{}", source.path, number + 1))
        .collect()
}
