//! Numbers, times and tables for people: short, with units, aligned.

/// Characters of one text from a node: an error message is a line or two.
const MAX_TEXT: usize = 600;

/// What a node says, safe for a terminal: one line, no control characters, bounded.
pub(crate) fn clean(text: &str) -> String {
    let mut shown: String = text
        .trim()
        .chars()
        .take(MAX_TEXT)
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c if c.is_control() => '?',
            c => c,
        })
        .collect();
    if text.trim().chars().nth(MAX_TEXT).is_some() {
        shown.push_str("...");
    }
    shown
}

/// An amount of bytes.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut scaled = count as f64;
    let mut unit = "B";
    for next in UNITS {
        // 1023.95 would be shown as 1024.0.
        if scaled < 1023.95 {
            break;
        }
        (scaled, unit) = (scaled / 1024.0, next);
    }
    format!("{scaled:.1} {unit}")
}

/// A time span, in microseconds.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => millis(us / 1_000),
    }
}

/// A time span, in milliseconds.
pub(crate) fn millis(ms: u64) -> String {
    let s = ms / 1_000;
    match s {
        0 => format!("{ms} ms"),
        1..10 => format!("{:.1} s", ms as f64 / 1e3),
        10..120 => format!("{s} s"),
        120..7_200 => format!("{} min", s / 60),
        7_200..172_800 => format!("{} h", s / 3_600),
        _ => format!("{} d", s / 86_400),
    }
}

/// Microseconds as bare milliseconds, for a column whose head has the unit.
pub(crate) fn bare_ms(us: u64) -> String {
    format!("{:.2}", us as f64 / 1e3)
}

/// Bytes for each second, or nothing while no time has passed.
pub(crate) fn rate(count: u64, ms: u64) -> String {
    let per_second = u128::from(count) * 1_000 / u128::from(ms.max(1));
    let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
    if ms == 0 { String::new() } else { format!("{}/s", bytes(per_second)) }
}

/// A part of a whole in percent, rounded down, so that 100 means all of it.
pub(crate) fn percent(done: u64, total: u64) -> u64 {
    let share = u128::from(done) * 100 / u128::from(total.max(1));
    u64::try_from(share).unwrap_or(u64::MAX).min(100)
}

/// A table with a name before each row; rows in which nobody has anything are left out.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with this head; its first cell is above the names of rows.
    pub(crate) fn new(head: Vec<String>) -> Self {
        Self { rows: vec![head] }
    }

    /// Adds a row unless all its cells are empty.
    pub(crate) fn row(&mut self, name: &str, cells: Vec<String>) {
        if cells.iter().any(|cell| !cell.is_empty()) {
            self.rows.push([vec![name.to_owned()], cells].concat());
        }
    }

    /// Its lines.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Table, bare_ms, bytes, clean, micros, millis, percent, rate};

    #[test]
    fn bytes_have_the_unit_that_keeps_them_short() {
        let shown = [0, 1023, 1024, 1_048_575, 1 << 20, 3 << 30, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "3.0 GiB", "16.0 EiB"]);
    }

    #[test]
    fn times_have_the_unit_that_keeps_them_short() {
        assert_eq!([0, 999, 4_840, 1_500_000].map(micros), ["0 us", "999 us", "4.8 ms", "1.5 s"]);
        let ages = [7, 1_250, 59_000, 121_000, 7_200_000, 172_800_000].map(millis);
        assert_eq!(ages, ["7 ms", "1.2 s", "59 s", "2 min", "2 h", "2 d"]);
        assert_eq!(bare_ms(4_846), "4.85");
    }

    #[test]
    fn shares_and_rates_do_not_overflow() {
        assert_eq!((percent(1, 3), percent(0, 0), percent(u64::MAX, 1)), (33, 0, 100));
        assert_eq!((rate(3 << 20, 1_000), rate(5, 0)), ("3.0 MiB/s".to_owned(), String::new()));
        assert_eq!(rate(u64::MAX, 1), "16.0 EiB/s");
    }

    #[test]
    fn what_a_node_says_cannot_steer_the_terminal() {
        assert_eq!(clean(" a\nb\x1b]0;x\x07c "), "a b?]0;x?c");
        assert_eq!(clean(&"x".repeat(700)).len(), 603);
    }

    #[test]
    fn columns_are_aligned_and_empty_rows_left_out() {
        let mut table = Table::new(vec![String::new(), "alpha".into(), "beta".into()]);
        table.row("role", vec!["paired".into(), "following".into()]);
        table.row("seed", vec![String::new(), String::new()]);
        table.row("lag", vec![String::new(), "1".into()]);
        assert_eq!(table.render(), "      alpha   beta\nrole  paired  following\nlag           1\n");
    }
}
