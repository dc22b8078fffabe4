//! Times of the host's clock in words that sort: `2026-03-01T12:00:00.000Z`.

/// Seconds of a day.
const DAY_S: u64 = 86_400;
/// Days from the first of March of the year 0 to the first of January 1970.
const DAYS_BEFORE: u64 = 719_468;
/// Days of four hundred years, after which the calendar repeats.
const CYCLE: u64 = 146_097;
/// The last day that has four digits for its year; what lies after it is no time of ours.
const LAST_MS: u64 = 253_402_300_799_999;

/// Milliseconds since 1970, as date and time in UTC.
pub fn utc(ms: u64) -> String {
    let ms = ms.min(LAST_MS);
    let (seconds, days) = (ms / 1000 % DAY_S, ms / 1000 / DAY_S + DAYS_BEFORE);
    let (cycle, day) = (days / CYCLE, days % CYCLE);
    // Years begin in March here, so that a leap day is the last of its year.
    let year = (day - day / 1460 + day / 36_524 - day / (CYCLE - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (date, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = cycle * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_123, "2000-02-29T00:00:00.123Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_795_449_599_000, "2026-11-23T15:59:59.000Z"),
            (u64::MAX, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }
}
