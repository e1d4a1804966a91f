//! Progress bars; on something that is no terminal only the first line shows.

use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes.
pub fn bytes(message: &str, total: u64) -> Result<ProgressBar> {
    eprintln!("{message} ({})", size(total));
    let bar = ProgressBar::new(total);
    bar.set_style(ProgressStyle::with_template(
        "{spinner} [{bar:30}] {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
    )?);
    bar.enable_steady_tick(Duration::from_millis(120));
    Ok(bar)
}

/// A size in the unit that reads best, decimal as package lists show it.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(12), "12 B");
        assert_eq!(size(373_157), "373 kB");
        assert_eq!(size(526_574_961), "526.6 MB");
        assert_eq!(size(1_100_000_000), "1.1 GB");
    }
}
