//! The benchmarks: each measures, ends, and prints what its schema promises.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::process::{Command, Output, Stdio};

use poolbroker_tests::binary::poolbroker_binary;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(poolbroker_binary());
    command.arg("bench").args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Runs a benchmark of one round, and checks its JSON against the schema.
fn results(arguments: &[&str]) -> Vec<Value> {
    let arguments: Vec<_> = arguments.iter().copied().chain(["--rounds", "1", "--json"]).collect();
    let output = bench(&arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&document), ["bench", "machine", "results", "rounds"]);
    assert_eq!((&document["bench"], &document["rounds"]), (&arguments[0].into(), &1.into()));
    assert!(document["machine"]["cores"].as_u64() > Some(0), "{document:#}");
    let results = document["results"].as_array().unwrap();
    for result in results {
        let expected = ["baseline", "case", "max", "median", "metric", "min", "ratio", "unit"];
        assert_eq!(keys(result), expected);
        let figure = |key: &str| result[key].as_f64().unwrap();
        assert!(figure("min") <= figure("median") && figure("median") <= figure("max"));
    }
    results.clone()
}

#[track_caller]
fn figure<'a>(results: &'a [Value], case: &str, metric: &str) -> &'a Value {
    let is_it = |result: &&Value| result["case"] == case && result["metric"] == metric;
    let found: Vec<_> = results.iter().filter(is_it).collect();
    assert_eq!(found.len(), 1, "{case} {metric} in {results:#?}");
    found[0]
}

/// All of it only where the sink may have a large receive buffer, which takes root.
#[track_caller]
fn assert_share(delivered: &Value) {
    let share = delivered["median"].as_f64().unwrap();
    assert!(share > 0.0 && share <= 1.0, "{delivered:#}");
}

#[test]
fn one_way_compares_a_case_with_sendto() {
    let results = results(&["one-way", "--case", "unix-all/producers=1/size=64"]);
    for metric in ["client_cpu_ns", "path_cpu_ns", "messages_per_s"] {
        let measured = figure(&results, "unix-all/producers=1/size=64", metric);
        assert_eq!(measured["baseline"], "sendto");
        assert!(measured["ratio"].as_f64() > Some(0.0), "{measured:#}");
        let baseline = figure(&results, "sendto/producers=1/size=64", metric);
        assert!(baseline["median"].as_f64() > Some(0.0) && baseline["ratio"].is_null());
    }
    let broker = figure(&results, "unix-all/producers=1/size=64", "broker_cpu_ns");
    assert!(broker["median"].as_f64() > Some(0.0), "{broker:#}");
    assert_share(figure(&results, "unix-all/producers=1/size=64", "delivered"));
}

#[test]
fn a_steady_rate_gives_latencies() {
    let case = "ring/producers=1/size=64/rate=10000";
    let results = results(&["one-way", "--case", case]);
    for metric in ["p50_us", "p99_us"] {
        let measured = figure(&results, case, metric);
        assert!(measured["median"].as_f64() > Some(0.0), "{measured:#}");
        assert_eq!(measured["baseline"], "sendto");
    }
    figure(&results, case, "added_p50_us");
    assert_share(figure(&results, case, "delivered"));
}

#[test]
fn the_ring_alone_is_compared_with_a_pipe() {
    let results = results(&["ring", "--case", "/pipe/"]);
    let one_way = figure(&results, "one-way/pipe/size=64", "messages_per_s");
    assert_eq!(one_way["baseline"], "ring-napped");
    let there_and_back = figure(&results, "round-trip/pipe/size=64", "p50_us");
    assert_eq!(there_and_back["baseline"], "ring-polled");
}

#[test]
fn idle_sessions_are_counted_in_cpu_and_bytes() {
    let results = results(&["idle", "--case", "unix/sessions=1000"]);
    let bytes = results.iter().find(|result| result["metric"] == "session_bytes").unwrap();
    assert_eq!(bytes["unit"], "bytes/session");
    assert!(results.iter().any(|result| result["metric"] == "cpu_percent"));
}

#[test]
fn a_case_that_does_not_exist_is_told_how_names_look() {
    let output = bench(&["one-way", "--case", "carrier-pigeon"]);
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("ring/producers=1/size=64"), "{told}");
}

#[test]
fn requests_compares_the_broker_with_a_direct_connection_and_counts_what_the_backend_sees() {
    let results = results(&["requests", "--case", "unix/echo/clients=64"]);
    for metric in ["requests_per_s", "p50_us", "p99_us", "client_cpu_ns", "broker_cpu_ns"] {
        let measured = figure(&results, "unix/echo/clients=64", metric);
        assert_eq!(measured["baseline"], "direct");
        assert!(measured["median"].as_f64() > Some(0.0), "{measured:#}");
    }
    let seen = |case| figure(&results, case, "backend_connections")["median"].as_f64().unwrap();
    assert!(seen("unix/echo/clients=64") <= 8.0);
    assert!((seen("direct/echo/clients=64") - 64.0).abs() < 0.5);
}

#[test]
fn what_a_client_feels_of_neighbours_is_compared_with_being_alone() {
    let results = results(&["isolation", "--case", "beside=down"]);
    for probe in ["unix", "direct"] {
        let beside = figure(&results, &format!("{probe}/beside=down"), "p99_us");
        assert_eq!(beside["baseline"], "alone");
        assert!(beside["ratio"].as_f64() > Some(0.0), "{beside:#}");
        assert!(figure(&results, &format!("{probe}/alone"), "p99_us")["ratio"].is_null());
    }
}
