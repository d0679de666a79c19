//! Settings that have no effect beside the others of their upstream. They are no errors, and whoever
//! wrote them expected something.

use poolbroker_proto::address::{Host, Protocol};

use super::UpstreamConfig;

/// Why this key, which is set, changes nothing for this upstream; none: it does.
pub(super) fn why_idle(key: &str, upstream: &UpstreamConfig) -> Option<String> {
    let is_tcp = upstream.url.protocol == Protocol::Tcp;
    let lends = upstream.leases_refused().is_none();
    let no_requests = || Some(format!("{}", upstream.requests_refused()?));
    let unless = |has_effect: bool, why: &str| (!has_effect).then(|| why.to_owned());
    match key {
        "balance" | "lease" if upstream.is_broadcast => {
            Some("a broadcast goes to every host, and is for one-way messages alone".to_owned())
        }
        "balance" => {
            let is_one =
                matches!(upstream.url.hosts.as_slice(), [at] if matches!(at.host, Host::Ip(_)));
            unless(!is_one, "the URL has one address")
        }
        "leases_max" | "lease_timeout" => {
            unless(lends, "this upstream lends no connections: set lease = true")
        }
        "waiters_max" | "wait_timeout" if !lends => no_requests(),
        "retry_budget_percent" if upstream.requests_refused().is_none() => unless(
            upstream.is_idempotent,
            "only requests that may be carried out twice are repeated: set idempotent = true",
        ),
        "idempotent" | "request_timeout" | "retry_budget_percent" | "pipeline_depth" => {
            no_requests()
        }
        "retransmit_interval" => {
            unless(upstream.limits.retransmits > 0, "nothing is sent again: set retransmits")
        }
        "tcp_user_timeout" | "keepalive_idle" | "keepalive_interval" | "keepalive_probes" => {
            unless(is_tcp, "it is for tcp")
        }
        "gso_segments_max" | "late_reply_window" => unless(!is_tcp, "it is for datagrams"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    fn idle(text: &str) -> Vec<(String, Option<usize>)> {
        let config = Config::parse(&format!("[upstream.it]\n{text}"), "pb.toml").unwrap();
        config.idle_settings.into_iter().map(|it| (it.key, it.line)).collect()
    }

    #[test]
    fn what_changes_nothing_is_told_with_its_place() {
        let tcp = "url = \"tcp://127.0.0.1:1\"\n";
        let cases = [
            ("balance = \"hash\"\n", vec!["balance"]),
            ("lease_timeout = \"5s\"\nleases_max = 2\n", vec!["lease_timeout", "leases_max"]),
            ("retry_budget_percent = 20\n", vec!["retry_budget_percent"]),
            ("retransmit_interval = \"1s\"\n", vec!["retransmit_interval"]),
            (
                "gso_segments_max = 8\nlate_reply_window = \"1s\"\n",
                vec!["gso_segments_max", "late_reply_window"],
            ),
        ];
        for (text, keys) in cases {
            let keys = keys.into_iter().enumerate();
            let keys: Vec<_> =
                keys.map(|(at, key)| (format!("upstream.it.{key}"), Some(3 + at))).collect();
            assert_eq!(idle(&format!("{tcp}{text}")), keys);
        }
        let write_only = "url = \"udp-write-only://a.test:1\"\nbalance = \"hash\"\nwaiters_max = 3\n\
                          idempotent = true\nkeepalive_idle = \"1s\"\n";
        let keys = ["waiters_max", "idempotent", "keepalive_idle"];
        assert_eq!(
            idle(write_only).into_iter().map(|(key, _)| key).collect::<Vec<_>>(),
            keys.map(|key| format!("upstream.it.{key}"))
        );
        let broadcast =
            "url = \"tcp://10.0.0.1:1,10.0.0.2:1\"\nmode = \"broadcast\"\nlease = true\n";
        assert_eq!(idle(broadcast), [("upstream.it.lease".to_owned(), Some(4))]);
    }

    #[test]
    fn what_has_an_effect_is_not_told() {
        let all = "url = \"tcp://10.0.0.1:1,10.0.0.2:1?framing=resp\"\nbalance = \"hash\"\n\
                   lease = true\nlease_timeout = \"5s\"\nleases_max = 2\nidempotent = true\n\
                   retry_budget_percent = 20\nwaiters_max = 3\nwait_timeout = \"1s\"\n\
                   request_timeout = \"1s\"\npipeline_depth = 4\nkeepalive_idle = \"1s\"\n\
                   tcp_user_timeout = \"1s\"\n";
        assert_eq!(idle(all), []);
        let udp = "url = \"udp://10.0.0.1:1\"\nretransmits = 2\nretransmit_interval = \"1s\"\n\
                   late_reply_window = \"1s\"\ngso_segments_max = 8\n";
        assert_eq!(idle(udp), []);
        let lent = "url = \"tcp://10.0.0.1:1?framing=raw\"\nlease = true\nwaiters_max = 2\n";
        assert_eq!(idle(lent), []);
    }
}
