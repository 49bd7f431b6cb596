//! What the operating system says of the processor and the memory. Where it says nothing, nothing is claimed.

use std::env::consts::ARCH;

/// The processor's own name, or else its architecture.
pub fn processor() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model_name(&text));
    name.unwrap_or_else(|| ARCH.to_owned())
}

/// Bytes of memory that the machine has.
pub fn memory() -> Option<u64> {
    total_memory(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// The first `model name` of a `/proc/cpuinfo`; ARM's has none.
fn model_name(cpuinfo: &str) -> Option<String> {
    let names = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let name = names.into_iter().find(|(key, _)| key.trim() == "model name")?.1.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// `MemTotal` of a `/proc/meminfo`, which counts in KiB.
fn total_memory(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_files_are_read_and_others_are_not_guessed_from() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Example CPU @ 2.0GHz\n\nprocessor\t: 1\nmodel name\t: Other\n";
        assert_eq!(model_name(cpuinfo).as_deref(), Some("Example CPU @ 2.0GHz"));
        assert_eq!(model_name("processor\t: 0\nBogoMIPS\t: 50.00\n"), None);
        assert_eq!(total_memory("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        for text in ["", "MemTotal: many kB", "MemTotal: 16384", "MemTotal: 18446744073709551615 kB"] {
            assert_eq!(total_memory(text), None, "{text}");
        }
    }
}
