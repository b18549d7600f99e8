//! Which process did something, so that somebody who finds what it left can tell whether it is at it still.
//!
//! A number alone says little: numbers are used again. With the time at which the process was started (in the kernel's
//! ticks since it was booted) and the number of that boot it means one process of one machine.

use std::sync::OnceLock;

/// A process of some machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started, in the kernel's ticks.
    pub started_ticks: u64,
    /// The boot of its machine.
    pub boot: String,
}

/// What has become of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs.
    Runs,
    /// It has ended.
    Ended,
    /// Its machine has been started again since, or it is another machine.
    Unknown,
}

impl Process {
    /// This one; `None` where /proc does not tell. Asked once: later it costs nothing.
    pub fn own() -> Option<&'static Process> {
        static OWN: OnceLock<Option<Process>> = OnceLock::new();
        let look = || {
            let pid = std::process::id();
            Some(Process { pid, started_ticks: started_ticks(pid)?, boot: boot()?.to_owned() })
        };
        OWN.get_or_init(look).as_ref()
    }

    /// What has become of it.
    pub fn fate(&self) -> Fate {
        match boot() {
            Some(boot) if boot == self.boot => match started_ticks(self.pid) {
                Some(ticks) if ticks == self.started_ticks => Fate::Runs,
                _ => Fate::Ended,
            },
            _ => Fate::Unknown,
        }
    }
}

/// The number of this boot.
pub fn boot() -> Option<&'static str> {
    static BOOT: OnceLock<Option<String>> = OnceLock::new();
    let look = || Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned());
    BOOT.get_or_init(look).as_deref()
}

fn started_ticks(pid: u32) -> Option<u64> {
    ticks_of(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The 22nd field. The second, a name in parentheses, may hold spaces and parentheses itself.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let own = Process::own().expect("there is /proc");
        assert_eq!(own.fate(), Fate::Runs);
        let before = Process { started_ticks: own.started_ticks.wrapping_sub(1), ..own.clone() };
        assert_eq!(before.fate(), Fate::Ended);
        let elsewhere = Process { boot: "another".into(), ..own.clone() };
        assert_eq!(elsewhere.fate(), Fate::Unknown);
    }

    #[test]
    fn names_of_programs_do_not_confuse() {
        let fields: Vec<String> = (3..30).map(|n| n.to_string()).collect();
        assert_eq!(ticks_of(&format!("7 (a ) b) {}", fields.join(" "))), Some(22));
        assert_eq!(ticks_of("7 (a) S 1"), None);
    }
}
