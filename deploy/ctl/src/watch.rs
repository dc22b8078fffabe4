//! `coloctl watch`: a line for each epoch that the runner cut and got an ack for.

use colo_proto::v1::{EpochReport, WatchRequest};
use serde::Serialize;
use std::time::{Duration, Instant};
use tonic::Streaming;

use crate::args::Watch;
use crate::connect::{Node, Nodes, QUESTION_LIMIT};
use crate::error::CtlError;
use crate::format::{bare_ms, bytes};
use crate::locate::{Wanted, nobody, of_one_vm, runner, stopped, survey};
use crate::output::{note, print, print_json};
use crate::status_json::Point;
use crate::words;

/// Lines between two heads: one is always on the screen.
const HEAD_EVERY: u64 = 20;
/// Between two looks for a runner.
const LOOK: Duration = Duration::from_millis(300);

/// Shows epochs until enough are shown, the vm is stopped, or nobody runs it for too long.
pub(crate) async fn run(nodes: &Nodes, options: &Watch) -> Result<(), CtlError> {
    let mut shown = 0;
    let mut began = false;
    while let Some(node) = source(nodes, Duration::from_secs(options.wait), began).await? {
        let mut client = node.client.clone();
        let lost = match node.answer(QUESTION_LIMIT, client.watch(WatchRequest {})).await {
            Ok(reports) => {
                note(&format!("watching {}", node.address));
                show(&node, reports, options, &mut shown).await?
            }
            // At the start it is an answer; later the node may just have died.
            Err(e) if !began || matches!(e, CtlError::Refused(_)) => return Err(e),
            Err(e) => Some(e),
        };
        let Some(lost) = lost else { return Ok(()) };
        note(&lost.to_string());
        began = true;
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// The node to watch: the one that is named, or the one that runs the guest; none if the vm is stopped.
async fn source(nodes: &Nodes, patience: Duration, began: bool) -> Result<Option<Node>, CtlError> {
    let started = Instant::now();
    loop {
        // A follower is watched only if it alone is named.
        if let [only] = nodes.addresses() {
            match nodes.connect(only).await {
                Err(e) if !began || started.elapsed() >= patience => return Err(e),
                Err(_) => {}
                Ok(node) => return Ok(Some(node)),
            }
        } else {
            let sights = survey(nodes).await;
            of_one_vm(&sights)?;
            if let Some((node, _, _)) = runner(&sights) {
                return Ok(Some(node.clone()));
            }
            if let Some(why) = stopped(&sights) {
                note(&why);
                return Ok(None);
            }
            let none_answers = sights.iter().all(|sight| sight.found.is_err());
            if started.elapsed() >= patience || (none_answers && !began) {
                return Err(nobody(&sights, Wanted::Runner, nodes.is_secured()));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Shows what comes from one node; told how the connection ended if not by the operator's wish.
async fn show(
    node: &Node,
    mut reports: Streaming<EpochReport>,
    options: &Watch,
    shown: &mut u64,
) -> Result<Option<CtlError>, CtlError> {
    loop {
        let report = match reports.message().await {
            Ok(Some(report)) => report,
            Ok(None) => {
                let reason = "it has ended".to_owned();
                return Ok(Some(CtlError::Lost { address: node.address.clone(), reason }));
            }
            Err(status) => return Ok(Some(node.error(&status))),
        };
        if options.shape.json {
            print_json(&Line::from(&report))?;
        } else {
            if report.missed > 0 {
                note(&format!("{} epochs are not shown, since this was slow to read", report.missed));
            }
            let head = if (*shown).is_multiple_of(HEAD_EVERY) { head() } else { String::new() };
            print(&(head + &row(&report)))?;
        }
        *shown += 1;
        if options.count.is_some_and(|count| *shown >= count) {
            return Ok(None);
        }
    }
}

/// Names of the columns, and their widths.
const COLUMNS: [(&str, usize); 11] = [
    ("point", 12),
    ("pages", 8),
    ("wire", 10),
    ("pause ms", 8),
    ("stop", 7),
    ("save", 7),
    ("harvest", 7),
    ("copy", 7),
    ("ack ms", 8),
    ("in flight", 9),
    ("backlog", 10),
];

fn head() -> String {
    line(COLUMNS.map(|(name, _)| name.to_owned()))
}

fn row(report: &EpochReport) -> String {
    let pause = report.pause.as_ref();
    let ms = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), bare_ms);
    line([
        words::point(report.point),
        report.pages.saturating_add(report.zero_pages).to_string(),
        bytes(report.wire_bytes),
        ms(pause.map(|pause| pause.total_us)),
        ms(pause.map(|pause| pause.stop_us)),
        ms(pause.map(|pause| pause.save_us)),
        ms(pause.map(|pause| pause.harvest_us)),
        ms(pause.map(|pause| pause.copy_us)),
        ms(report.ack_us),
        report.in_flight.to_string(),
        bytes(report.backlog_bytes),
    ])
}

fn line(cells: [String; COLUMNS.len()]) -> String {
    let padded: Vec<String> =
        cells.iter().zip(COLUMNS).map(|(cell, (_, width))| format!("{cell:>width$}")).collect();
    padded.join(" ") + "\n"
}

/// An epoch, for scripts. Keys are stable.
#[derive(Serialize)]
struct Line {
    point: Option<Point>,
    role: &'static str,
    pages: u64,
    zero_pages: u64,
    wire_bytes: u64,
    pause_us: Option<PauseUs>,
    ack_us: Option<u64>,
    in_flight: u32,
    backlog_bytes: u64,
    console_offset: u64,
    missed: u64,
    stage_us: Option<u64>,
    apply_us: Option<u64>,
}

#[derive(Serialize)]
struct PauseUs {
    total: u64,
    stop: u64,
    save: u64,
    harvest: u64,
    copy: u64,
}

impl From<&EpochReport> for Line {
    fn from(report: &EpochReport) -> Self {
        Self {
            point: report.point.map(Point::from),
            role: words::role(report.role),
            pages: report.pages,
            zero_pages: report.zero_pages,
            wire_bytes: report.wire_bytes,
            pause_us: report.pause.map(|pause| PauseUs {
                total: pause.total_us,
                stop: pause.stop_us,
                save: pause.save_us,
                harvest: pause.harvest_us,
                copy: pause.copy_us,
            }),
            ack_us: report.ack_us,
            in_flight: report.in_flight,
            backlog_bytes: report.backlog_bytes,
            console_offset: report.console_offset,
            missed: report.missed,
            stage_us: report.stage_us,
            apply_us: report.apply_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{head, row};
    use colo_proto::v1::{EpochReport, Pause, Point};

    #[test]
    fn rows_stand_below_their_heads() {
        let pause = Pause { stop_us: 120, save_us: 60, harvest_us: 30, copy_us: 410, total_us: 640 };
        let report = EpochReport {
            point: Some(Point { term: 2, epoch: 1234 }),
            pages: 64,
            wire_bytes: 270_000,
            pause: Some(pause),
            ack_us: Some(2_310),
            in_flight: 1,
            ..Default::default()
        };
        let (head, row) = (head(), row(&report));
        assert_eq!(head.len(), row.len());
        let words: Vec<&str> = row.split_whitespace().collect();
        let wanted =
            ["2.1234", "64", "263.7", "KiB", "0.64", "0.12", "0.06", "0.03", "0.41", "2.31", "1", "0", "B"];
        assert_eq!(words, wanted);
        assert!(super::row(&EpochReport::default()).contains(" - "), "a follower has no pause");
    }
}
