//! Figures of a run: quantiles, and what this process holds in memory.

use std::time::Duration;

/// The value below which `fraction` (0 to 1) of the samples lie, in milliseconds.
pub fn quantile_ms(samples: &mut [Duration], fraction: f64) -> f64 {
    if samples.is_empty() {
        return 0.0;
    }
    samples.sort_unstable();
    let last = samples.len() - 1;
    let at = (last as f64 * fraction).round() as usize;
    samples[at.min(last)].as_secs_f64() * 1e3
}

/// Resident memory of this process in bytes.
pub fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    pages * colo_common::PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::quantile_ms;
    use std::time::Duration;

    #[test]
    fn quantiles_are_samples() {
        let mut samples: Vec<Duration> = (1..=101).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile_ms(&mut samples, 0.5), 51.0);
        assert_eq!(quantile_ms(&mut samples, 0.99), 100.0);
        assert_eq!(quantile_ms(&mut [], 0.5), 0.0);
    }
}
