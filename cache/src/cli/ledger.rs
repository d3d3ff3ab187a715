//! The commands for the ledger's file, which ask no service.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf, absolute},
};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{Failure, Output, print, show::line};
use crate::{
    clock,
    config::Config,
    exit,
    ledger::tools::{self, Findings, IfThere, MARGIN, Restored, ToolError},
};

#[derive(Debug, Subcommand)]
pub(super) enum LedgerCommand {
    /// Say whether the ledger is sound, or what is wrong with it. Changes nothing; the service may run.
    Check {
        /// A ledger or a backup of one; the configuration's ledger if absent.
        file: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// Copy the ledger, checked, to a file. The service may run.
    Backup {
        /// The file to make.
        destination: PathBuf,
        /// Replace the file if it is there.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Put a backup in the ledger's place, and keep what was there. Only while the service is stopped, or in rescue mode
    /// because of its ledger.
    Restore {
        /// What `backup` has made, or a ledger that an earlier restore has kept.
        backup: PathBuf,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(super) struct Common {
    /// Configuration file, for the state directory; the default one need not exist.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// How to print the result.
    #[arg(long, short, value_enum, default_value = "text")]
    output: Output,
}

impl Common {
    fn state_directory(&self) -> Result<PathBuf, Failure> {
        let config = Config::read(self.config.as_deref());
        let config = config.map_err(|e| Failure { message: e.to_string(), status: exit::CONFIGURATION })?;
        Ok(config.state.directory)
    }

    fn ledger(&self) -> Result<PathBuf, Failure> {
        Ok(self.state_directory()?.join("ledger.db"))
    }
}

pub(super) fn run(command: LedgerCommand) -> Result<(), Failure> {
    match command {
        LedgerCommand::Check { file, common } => {
            let ledger = file.map_or_else(|| common.ledger(), |file| full(&file))?;
            let findings = tools::check(&ledger)?;
            print(&checked(&ledger, &findings, common.output))?;
            if findings.problems.is_empty() { Ok(()) } else { Err(damaged(&ledger)) }
        }
        LedgerCommand::Backup { destination, force, common } => {
            let (ledger, destination) = (common.ledger()?, full(&destination)?);
            let if_there = if force { IfThere::Replace } else { IfThere::Keep };
            let findings = tools::backup(&ledger, &destination, if_there)?;
            print(&backed_up(&ledger, &destination, &findings, common.output))
        }
        LedgerCommand::Restore { backup, common } => {
            let (directory, backup) = (common.state_directory()?, full(&backup)?);
            let restored = tools::restore(&directory, &backup, clock::wall().0 / 1_000_000)?;
            print(&put_back(&backup, &restored, common.output))
        }
    }
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Self {
        Self { message: error.to_string(), status: error.exit_status() }
    }
}

/// What is printed and stored must not depend on where the command was run.
fn full(path: &Path) -> Result<PathBuf, Failure> {
    let message = |e| format!("{}: {e}; name a file", path.display());
    absolute(path).map_err(|e| Failure { message: message(e), status: exit::USAGE })
}

fn damaged(ledger: &Path) -> Failure {
    let message = format!(
        "the ledger {} is damaged. It is left as it is, for it is all that says which VM holds which disk; without a \
         backup, keep it with its -wal and -shm until all VMs of this host are known to be gone",
        ledger.display()
    );
    Failure { message, status: exit::LEDGER_DAMAGED }
}

fn checked(ledger: &Path, findings: &Findings, output: Output) -> String {
    let path = ledger.display();
    if output == Output::Json {
        return line(&json_of(ledger, findings, []));
    }
    if findings.problems.is_empty() {
        return format!("ledger {path}: {}: sound\n", contents(findings));
    }
    let mut text = format!("ledger {path}: damaged\n");
    for problem in &findings.problems {
        let _ = writeln!(text, "  {}\n    way out: {}", problem.what, problem.way_out);
    }
    text
}

fn backed_up(ledger: &Path, backup: &Path, findings: &Findings, output: Output) -> String {
    match output {
        Output::Json => line(&json_of(ledger, findings, [("backup", json!(backup))])),
        Output::Text => {
            format!("ledger {} is in {}: {}: sound\n", ledger.display(), backup.display(), contents(findings))
        }
    }
}

fn put_back(backup: &Path, restored: &Restored, output: Output) -> String {
    if output == Output::Json {
        let moved = restored.moved.iter().map(|moved| json!({ "from": moved.from, "to": moved.to }));
        let unread = restored.unread.iter().map(|(path, what)| json!({ "ledger": path, "what": what }));
        let more = [("backup", json!(backup)), ("moved", moved.collect()), ("unread", unread.collect())];
        return line(&json_of(&restored.ledger, &restored.findings, more));
    }
    let mut text = String::new();
    let ledger = restored.ledger.display();
    let _ = writeln!(text, "restored  {ledger} from {}", backup.display());
    let _ = writeln!(text, "          {}", contents(&restored.findings));
    for moved in &restored.moved {
        let _ = writeln!(text, "kept      {} as {}", moved.from.display(), moved.to.display());
    }
    for (path, what) in &restored.unread {
        let _ = writeln!(text, "unread    {}: {what}", path.display());
        let _ = writeln!(
            text,
            "          what it gave out is not known: counters go on {MARGIN} above the others'"
        );
    }
    text.push_str(
        "next      start the service (systemctl start cowshed.socket cowshed.service, or cowshed serve) unless it waits\n\
         \x20         for its ledger in rescue mode, which it then leaves by itself; compare\n\
         \x20         `cowshed leases` with the VMs that run: what was acquired or released after the backup is not in it\n",
    );
    text
}

/// "format 3, 3 leases (2 granted, 1 releasing), 1 pin, generations up to 7"
fn contents(findings: &Findings) -> String {
    let total: u64 = findings.leases.values().sum();
    let states = findings.leases.iter().map(|(state, count)| format!("{count} {state}")).collect::<Vec<_>>();
    let states = if states.is_empty() { String::new() } else { format!(" ({})", states.join(", ")) };
    let leases = if total == 1 { "lease" } else { "leases" };
    let pins = match findings.pins {
        0 => String::new(),
        1 => ", 1 pin".to_owned(),
        pins => format!(", {pins} pins"),
    };
    format!(
        "format {}, {total} {leases}{states}{pins}, generations up to {}",
        findings.format, findings.last_generation
    )
}

fn json_of<const N: usize>(ledger: &Path, findings: &Findings, more: [(&str, Value); N]) -> Value {
    let problems = findings.problems.iter();
    let problems: Vec<Value> =
        problems.map(|problem| json!({ "what": problem.what, "way_out": problem.way_out })).collect();
    let mut fields = Map::new();
    fields.insert("ledger".to_owned(), json!(ledger));
    fields.insert("sound".to_owned(), json!(problems.is_empty()));
    if problems.is_empty() {
        fields.insert("format".to_owned(), json!(findings.format));
        fields.insert("leases".to_owned(), json!(findings.leases));
        fields.insert("pins".to_owned(), json!(findings.pins));
        fields.insert("last_generation".to_owned(), json!(findings.last_generation));
    }
    fields.insert("problems".to_owned(), json!(problems));
    fields.extend(more.map(|(name, value)| (name.to_owned(), value)));
    Value::Object(fields)
}
