//! The manual pages: made from the arguments and from the table of limits, and compared with the
//! committed ones. `UPDATE_MAN=1 cargo test -p poolbroker man_pages` writes them.

use std::path::Path;

use clap::{Arg, Command, CommandFactory};
use clap_mangen::Man;

use super::Arguments;
use super::exit::EXIT_CODES;
use crate::config::LIMIT_SECTIONS;

#[test]
fn man_pages_are_current() {
    for name in ["poolbroker.1", "poolbroker.toml.5"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name);
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        let page = match name {
            "poolbroker.1" => command_page(),
            _ => configuration_page(&committed),
        };
        if std::env::var_os("UPDATE_MAN").is_some() {
            std::fs::write(&path, page).unwrap();
        } else {
            assert!(
                committed == page,
                "{name} is out of date: run `UPDATE_MAN=1 cargo test -p poolbroker man_pages`"
            );
        }
    }
}

/// One page for the command and its sub-commands.
fn command_page() -> String {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    let man = Man::new(command.clone());
    let mut page = rendered(|page| man.render_title(page));
    page += &rendered(|page| man.render_name_section(page));
    page += &rendered(|page| man.render_synopsis_section(page));
    page += &rendered(|page| man.render_description_section(page));
    page += &rendered(|page| man.render_options_section(page));
    for (name, sub) in documented(&command, "") {
        page += &format!(".SH \"COMMAND {}\"\n", name.to_uppercase());
        // What all share is told once, above.
        let shared = |argument: &Arg| argument.is_global_set() || argument.get_id() == "help";
        let own = sub.clone().mut_args(|argument| match shared(&argument) {
            true => argument.hide(true),
            false => argument,
        });
        let man = Man::new(own);
        let mut sections = rendered(|page| man.render_synopsis_section(page));
        sections += &rendered(|page| man.render_description_section(page));
        sections += &rendered(|page| man.render_options_section(page));
        page += &sections.replace(".SH ", ".SS ");
        let help = sub.get_after_help().unwrap().to_string();
        let (examples, _) = help.split_once("\n\n").unwrap();
        let examples = examples.strip_prefix("Examples:\n").unwrap();
        page += &format!(".SS EXAMPLES\n.nf\n{}\n.fi\n", escaped(examples));
    }
    let (title, codes) = EXIT_CODES.split_once('\n').unwrap();
    page += &format!(".SH \"EXIT STATUS\"\n{title}\n.PP\n.nf\n{}\n.fi\n", escaped(codes));
    page += ".SH \"SEE ALSO\"\n\\fBpoolbroker.toml\\fR(5)\n";
    page
}

/// The sub-commands for people, those of sub-commands behind them, each with its whole name.
fn documented<'a>(command: &'a Command, before: &str) -> Vec<(String, &'a Command)> {
    let for_people = |sub: &&Command| !sub.is_hide_set() && sub.get_name() != "help";
    let mut found = Vec::new();
    for sub in command.get_subcommands().filter(for_people) {
        let name = format!("{before}{}", sub.get_name());
        found.push((name.clone(), sub));
        found.extend(documented(sub, &format!("{name} ")));
    }
    found
}

/// One section, without the two lines that clap_mangen puts before each.
fn rendered(render: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>) -> String {
    let mut page = Vec::new();
    render(&mut page).unwrap();
    let page = String::from_utf8(page).unwrap();
    page.replace(".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n", "").replace("\\*(Aq", "\\(aq")
}

/// The committed page with its list of limits made anew; the prose around it is written by hand.
fn configuration_page(committed: &str) -> String {
    let (head, rest) = committed.split_once(LIMITS_BEGIN).unwrap();
    let (_, tail) = rest.split_once(LIMITS_END).unwrap();
    let mut limits = String::new();
    for section in LIMIT_SECTIONS {
        limits += &format!(".SS \"{}\"\n", escaped(section.header));
        for row in section.rows {
            limits += &format!(
                ".TP\n\\fB{}\\fR\n{}\n.br\n{}.\n",
                escaped(&row.assignment()),
                escaped(row.reason),
                escaped(&row.range_text()),
            );
        }
    }
    format!("{head}{LIMITS_BEGIN}{limits}{LIMITS_END}{tail}")
}

const LIMITS_BEGIN: &str = ".\\\" Made from the table of limits: begin\n";
const LIMITS_END: &str = ".\\\" Made from the table of limits: end\n";

fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}
