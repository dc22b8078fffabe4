//! `coloctl status`: the nodes side by side.

use colo_common::life::LIFE;
use colo_proto::v1::{Role, StatusReply};

use crate::connect::Nodes;
use crate::error::CtlError;
use crate::format::{Table, bytes, clean, micros, millis, percent};
use crate::locate::{Sight, Wanted, nobody, runner, stopped, survey};
use crate::output::{print, print_json};
use crate::status_json::{answer, lag, protected};
use crate::{devices, words};

/// Shows all nodes. It fails only if none answers.
pub(crate) async fn run(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    let sights = survey(nodes).await;
    if json {
        print_json(&answer(&sights))?;
    }
    if sights.iter().all(|sight| sight.found.is_err()) {
        return Err(nobody(&sights, Wanted::Runner, nodes.is_secured()));
    }
    if json { Ok(()) } else { print(&page(&sights)) }
}

/// A row of the table: its name, and what a node says to it.
type Row = (&'static str, fn(&StatusReply) -> String);

const ROWS: [Row; 29] = [
    ("vm", |s| clean(&s.vm)),
    ("role", |s| words::role(s.role).to_owned()),
    ("protection", protection),
    ("register", |s| words::register(s.register.as_ref())),
    ("output", |s| clean(&s.holding)),
    ("ack policy", policy),
    ("failover", |s| words::failover(s.failover).to_owned()),
    ("lag", behind),
    ("tip", |s| words::point(s.points.unwrap_or_default().tip)),
    ("acked", |s| words::point(s.points.unwrap_or_default().acked)),
    ("staged", |s| words::point(s.points.unwrap_or_default().staged)),
    ("applied", |s| words::point(s.points.unwrap_or_default().applied)),
    ("persisted", |s| words::point(s.points.unwrap_or_default().persisted)),
    ("released", |s| words::point(s.points.unwrap_or_default().released)),
    ("stale copy", |s| words::point(s.points.unwrap_or_default().stale)),
    ("replica", |s| words::id(&s.replica).chars().take(16).collect()),
    ("link", link),
    ("guest", guest),
    ("disk", devices::disk),
    ("network", devices::network),
    ("frames", devices::frames),
    ("console", console),
    ("epochs", epochs),
    ("wire", |s| s.counters.filter(|c| c.wire_bytes > 0).map(|c| bytes(c.wire_bytes)).unwrap_or_default()),
    ("copies", copies),
    ("trouble", trouble),
    ("unprotected", unprotected),
    ("up", |s| millis(s.uptime_ms)),
    ("version", |s| format!("{} (protocol {})", clean(&s.version), s.protocol)),
];

fn page(sights: &[Sight]) -> String {
    let mut head = vec![String::new()];
    head.extend(sights.iter().map(|sight| match &sight.found {
        Ok((_, status)) => format!("{} {}", clean(&status.node), sight.address),
        Err(_) => format!("? {}", sight.address),
    }));
    let mut table = Table::new(head);
    for (name, cell) in ROWS {
        let cells = sights.iter().map(|sight| match &sight.found {
            Ok((_, status)) => cell(status),
            Err(_) if name == "role" => "no answer".to_owned(),
            Err(_) => String::new(),
        });
        table.row(name, cells.collect());
    }
    format!("{}\n{}{}", verdict(sights), table.render(), errors(sights))
}

/// The one line that an operator looks for.
fn verdict(sights: &[Sight]) -> String {
    let Some((node, status, _)) = runner(sights) else {
        let nobody = || {
            let spares = "these nodes are spares: each waits for a vm that needs it";
            let text = if all_spares(sights) { spares } else { "NOBODY of these nodes runs the vm" };
            text.to_owned()
        };
        return stopped(sights).unwrap_or_else(nobody) + "\n";
    };
    let (vm, name) = (clean(&status.vm), clean(&status.node));
    if protected(status) {
        format!("{vm} runs on {name} ({}), protected\n", node.address)
    } else if status.role == Role::Paired as i32 {
        format!("{vm} runs on {name} ({}), NO LINK to the node that protects it\n", node.address)
    } else {
        let since = millis(status.unprotected_ms);
        format!("{vm} runs on {name} ({}), NOT PROTECTED for {since}\n", node.address)
    }
}

/// Whether nobody could run a vm, as none is bound to one.
fn all_spares(sights: &[Sight]) -> bool {
    let mut answers = sights.iter().filter_map(|sight| sight.found.as_ref().ok()).peekable();
    answers.peek().is_some() && answers.all(|(_, status)| status.role == Role::Spare as i32)
}

/// What went wrong last, below the table: it is too long for a column.
fn errors(sights: &[Sight]) -> String {
    let disks = sights.iter().filter_map(|sight| devices::failure(&sight.found.as_ref().ok()?.1));
    let lines = sights.iter().filter_map(|sight| match &sight.found {
        Ok((_, status)) if status.last_error.is_empty() => None,
        Ok((_, status)) => {
            let age = millis(status.last_error_age_ms);
            Some(format!("{}, {age} ago: {}\n", clean(&status.node), clean(&status.last_error)))
        }
        Err(e) => Some(format!("{e}\n")),
    });
    let copies = sights.iter().filter_map(|sight| {
        let (_, status) = sight.found.as_ref().ok()?;
        let why = &status.seed.as_ref().filter(|seed| !seed.why.is_empty())?.why;
        Some(format!("{}, why so much is copied: {}\n", clean(&status.node), clean(why)))
    });
    let lines: String = disks.chain(copies).chain(lines).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// In all, at this node.
fn unprotected(status: &StatusReply) -> String {
    let total = status.unprotected_total_ms;
    if total > 0 { format!("{} in all", millis(total)) } else { String::new() }
}

fn protection(status: &StatusReply) -> String {
    match Role::try_from(status.role) {
        Ok(Role::Paired) if !protected(status) => "NO LINK".to_owned(),
        Ok(Role::Paired) => "protected".to_owned(),
        Ok(Role::Seeding) => status.seed.as_ref().map_or_else(
            || "a copy is made".to_owned(),
            |seed| {
                let share = percent(seed.bytes_done, seed.bytes_total);
                format!("copying {share}% of {}", bytes(seed.bytes_total))
            },
        ),
        Ok(Role::Joining | Role::Pairing) => "nearly".to_owned(),
        Ok(Role::Alone) => format!("NONE for {}", millis(status.unprotected_ms)),
        Ok(Role::Following) => "holds a whole copy".to_owned(),
        Ok(Role::Receiving) => "its copy is not whole yet".to_owned(),
        Ok(Role::Spare) => "for any vm that needs it".to_owned(),
        _ => String::new(),
    }
}

fn policy(status: &StatusReply) -> String {
    let wait = if status.ack_policy_pending { ", a change waits" } else { "" };
    format!("{}{wait}", words::policy(status.ack_policy))
}

fn behind(status: &StatusReply) -> String {
    let mut parts = Vec::new();
    parts.extend(lag(status).map(|epochs| format!("{epochs} epochs")));
    parts.extend(status.epoch_age_ms.map(|age| format!("{} old", millis(age))));
    if let Some(link) = status.link.as_ref() {
        if link.in_flight > 0 {
            parts.push(format!("{} in flight", link.in_flight));
        }
        if link.backlog_bytes > 0 {
            parts.push(format!("{} backlog", bytes(link.backlog_bytes)));
        }
    }
    parts.join(", ")
}

fn link(status: &StatusReply) -> String {
    let Some(link) = status.link.as_ref() else { return String::new() };
    let state = if link.connected { "up" } else { "DOWN" };
    let mut text = format!("{state} to {}", clean(&link.peer));
    if link.rtt_us > 0 {
        text.push_str(&format!(", round trip {}", micros(link.rtt_us)));
    }
    if link.silent_ms > 0 {
        text.push_str(&format!(", silent for {}", millis(link.silent_ms)));
    }
    text
}

fn guest(status: &StatusReply) -> String {
    let Some(guest) = status.guest.as_ref() else { return String::new() };
    let state = if guest.running { "running" } else { "not running" };
    let (kind, memory) = (clean(&guest.hypervisor), bytes(guest.memory_bytes));
    let tracker = words::tracker(guest.tracker.as_ref());
    format!("{state}, {kind}, {} vCPU, {memory}, {tracker}", guest.vcpus)
}

fn console(status: &StatusReply) -> String {
    let console = status.console.unwrap_or_default();
    let known = console.released > 0 || console.input > 0;
    // Of the guest that was started last.
    let [out, taken] = [console.released, console.input].map(|offset| offset % LIFE);
    if known { format!("{out} B out, {taken} B in") } else { String::new() }
}

fn epochs(status: &StatusReply) -> String {
    let counters = status.counters.unwrap_or_default();
    if counters.epochs == 0 {
        return String::new();
    }
    format!("{} with {} pages", counters.epochs, counters.pages.saturating_add(counters.zero_pages))
}

fn copies(status: &StatusReply) -> String {
    let counters = status.counters.unwrap_or_default();
    let named = [
        ("in full", counters.full_resyncs),
        ("of differences", counters.resyncs),
        ("of what was missed", counters.rejoins),
    ];
    let parts: Vec<String> =
        named.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    parts.join(", ")
}

fn trouble(status: &StatusReply) -> String {
    let counters = status.counters.unwrap_or_default();
    let named = [
        ("links lost", counters.link_losses),
        ("failed epochs", counters.failed_epochs),
        ("ring overruns", counters.ring_overruns),
        ("promotions", counters.promotions),
    ];
    let parts: Vec<String> =
        named.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::{ROWS, behind, policy, protection};
    use colo_proto::v1::{Link, Point, Points, ProtectProgress, Role, StatusReply};

    #[test]
    fn a_node_that_knows_nothing_fills_no_cell_with_nonsense() {
        let filled = ROWS.iter().filter(|(_, cell)| !cell(&StatusReply::default()).is_empty());
        assert_eq!(filled.map(|(name, _)| *name).collect::<Vec<_>>(), ["role", "up", "version"]);
    }

    #[test]
    fn protection_and_lag_are_told_in_few_words() {
        let role = |role: Role| StatusReply { role: role.into(), ..Default::default() };
        let seed = ProtectProgress { bytes_done: 1 << 30, bytes_total: 4 << 30, ..Default::default() };
        assert_eq!(
            protection(&StatusReply { seed: Some(seed), ..role(Role::Seeding) }),
            "copying 25% of 4.0 GiB"
        );
        let alone = StatusReply { unprotected_ms: 61_000, ..role(Role::Alone) };
        assert_eq!(protection(&alone), "NONE for 61 s");
        let point = |epoch| Some(Point { term: 2, epoch });
        let points = Points { tip: point(9), acked: point(6), ..Default::default() };
        let link = Link { in_flight: 3, backlog_bytes: 2048, ..Default::default() };
        let status = StatusReply { points: Some(points), link: Some(link), ..role(Role::Paired) };
        assert_eq!(behind(&status), "3 epochs, 3 in flight, 2.0 KiB backlog");
        assert_eq!(protection(&status), "NO LINK");
        let aged = StatusReply { epoch_age_ms: Some(12), ..Default::default() };
        assert_eq!(behind(&aged), "12 ms old");
        assert_eq!(protection(&role(Role::Spare)), "for any vm that needs it");
        let changing = StatusReply { ack_policy: 1, ack_policy_pending: true, ..Default::default() };
        assert_eq!(policy(&changing), "memory, a change waits");
    }
}
