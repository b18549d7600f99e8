//! Running what is measured: a command to its end, or a server for a while, and what either used.
//!
//! Output goes to files, so that nobody waits for a reader. Where `perf stat` works, system calls are counted by it, in
//! a round of its own that is not timed; context switches come from there or from the kernel's account of the child.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::Fallible;
use crate::stop;
use crate::sys::{Usage, cpu_secs};

/// How long a server may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Busy time of all CPUs since the machine started, in seconds: everything but idle, waiting for I/O and stolen time.
pub fn machine_busy_secs() -> Fallible<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    busy_of(&stat).ok_or_else(|| "no line of all CPUs in /proc/stat".into())
}

fn busy_of(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks.as_slice() else { return None };
    // The ticks of /proc are 10 ms everywhere.
    Some((user + nice + system + irq + softirq) / 100.0)
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    pub wall_secs: f64,
    pub usage: Usage,
    pub stdout: String,
}

fn spawn(line: &[String], out: &Path, stdout: Option<Stdio>) -> Fallible<i32> {
    let (program, arguments) = line.split_first().ok_or("an empty command line")?;
    let err = File::create(out.with_extension("err"))?;
    let stdout = match stdout {
        Some(stdout) => stdout,
        None => File::create(out)?.into(),
    };
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(err)
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    let pid = i32::try_from(child.id())?;
    stop::remember(pid);
    Ok(pid)
}

fn complaint(out: &Path) -> String {
    let text = std::fs::read_to_string(out.with_extension("err")).unwrap_or_default();
    text.trim().lines().rev().take(3).collect::<Vec<_>>().join("; ")
}

/// Runs a command; then, still inside its time, `after` makes its work durable where the command does not. The files of
/// its output are `out` and the same with the extension `err`.
pub fn run(line: &[String], out: &Path, after: &dyn Fn() -> Fallible<()>) -> Fallible<Ended> {
    stop::check()?;
    let began = Instant::now();
    let pid = spawn(line, out, None)?;
    let (status, usage) = stop::wait(pid)?;
    stop::check()?;
    if !status.success() {
        return Err(format!("`{}` ended with {status}: {}", line.join(" "), complaint(out)).into());
    }
    after()?;
    let wall_secs = began.elapsed().as_secs_f64();
    Ok(Ended { wall_secs, usage, stdout: std::fs::read_to_string(out).unwrap_or_default() })
}

/// A process that runs beside; dropping it ends it.
#[derive(Debug)]
pub struct Daemon {
    pid: i32,
    out: PathBuf,
    gone: bool,
}

impl Daemon {
    /// Starts it.
    pub fn start(line: &[String], out: &Path) -> Fallible<Daemon> {
        stop::check()?;
        Ok(Daemon { pid: spawn(line, out, None)?, out: out.to_owned(), gone: false })
    }

    /// Starts it with another standard output than the file.
    pub fn start_into(line: &[String], out: &Path, stdout: Stdio) -> Fallible<Daemon> {
        stop::check()?;
        Ok(Daemon { pid: spawn(line, out, Some(stdout))?, out: out.to_owned(), gone: false })
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// CPU seconds that it has used.
    pub fn cpu_secs(&self) -> Fallible<f64> {
        Ok(cpu_secs(self.pid)?)
    }

    /// Peak resident memory so far, in MiB.
    pub fn rss_mib_max(&self) -> Fallible<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        Ok(kib.ok_or("no VmHWM in /proc/PID/status")? / 1024.0)
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// Waits until `ready` says so; an error when it ends before or takes longer than `patience`.
    pub fn until<T>(
        &self,
        patience: Duration,
        pause: Duration,
        mut ready: impl FnMut() -> Fallible<Option<T>>,
    ) -> Fallible<Option<T>> {
        let began = Instant::now();
        loop {
            stop::check()?;
            if let Some(value) = ready()? {
                return Ok(Some(value));
            }
            if stop::has_ended(self.pid, false)? {
                return Err(format!("a server ended by itself: {}", complaint(&self.out)).into());
            }
            if began.elapsed() > patience {
                return Ok(None);
            }
            std::thread::sleep(pause);
        }
    }

    /// Waits until its socket takes connections.
    pub fn until_listening(&self, socket: &Path) -> Fallible<()> {
        let connected = || Ok(std::os::unix::net::UnixStream::connect(socket).ok());
        let connection = self.until(PATIENCE, Duration::from_millis(1), connected)?;
        connection.map(drop).ok_or_else(|| format!("nobody listens at {}", socket.display()).into())
    }

    /// Asks it to end and waits until it has; an error if it has to be killed.
    pub fn end(mut self, signal: Signal) -> Fallible<(Usage, String)> {
        use std::os::unix::process::ExitStatusExt;
        let (status, usage) = self.finish(signal)?;
        stop::check()?;
        if status.signal() == Some(Signal::KILL.as_raw()) {
            return Err(format!(
                "a process did not end when asked to, and was killed: {}",
                complaint(&self.out)
            )
            .into());
        }
        Ok((usage, self.output()))
    }

    /// Waits for its own end.
    pub fn wait(mut self) -> Fallible<(std::process::ExitStatus, Usage, String)> {
        let (status, usage) = stop::wait(self.pid)?;
        self.gone = true;
        stop::check()?;
        Ok((status, usage, self.output()))
    }

    fn finish(&mut self, signal: Signal) -> Fallible<(std::process::ExitStatus, Usage)> {
        stop::signal(self.pid, signal);
        let began = Instant::now();
        while !stop::has_ended(self.pid, false)? {
            if began.elapsed() > PATIENCE {
                stop::signal(self.pid, Signal::KILL);
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let ended = stop::wait(self.pid)?;
        self.gone = true;
        Ok(ended)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.gone {
            // Nobody is left to be told.
            let _ = self.finish(Signal::TERM);
        }
    }
}

const EVENTS: &str = "raw_syscalls:sys_enter,context-switches";

/// Whether system calls can be counted here.
pub fn can_count() -> bool {
    let line = ["perf", "stat", "-x,", "-e", EVENTS, "true"];
    let output = Command::new(line[0]).args(&line[1..]).stdin(Stdio::null()).output();
    output.is_ok_and(|output| {
        output.status.success() && counts_of(&String::from_utf8_lossy(&output.stderr)).is_some()
    })
}

/// A command line that counts what another one does, into `file`.
pub fn counted(line: &[String], file: &Path) -> Vec<String> {
    let file = file.display().to_string();
    let mut all: Vec<String> =
        ["perf", "stat", "-x,", "-o", &file, "-e", EVENTS, "--"].map(str::to_owned).to_vec();
    all.extend_from_slice(line);
    all
}

/// System calls and context switches that `perf stat` wrote to `file`.
pub fn counts(file: &Path) -> Option<(f64, f64)> {
    counts_of(&std::fs::read_to_string(file).ok()?)
}

fn counts_of(text: &str) -> Option<(f64, f64)> {
    let of = |name: &str| {
        let line = text.lines().find(|line| line.contains(name))?;
        line.split(',').next()?.parse::<f64>().ok()
    };
    Some((of("raw_syscalls:sys_enter")?, of("context-switches")?))
}

/// Counts what a process that runs already does, until it is dropped or ended.
#[derive(Debug)]
pub struct Counter {
    perf: Daemon,
    file: PathBuf,
}

impl Counter {
    /// Starts to count the process `pid`, its threads and what they start.
    pub fn attach(pid: i32, file: &Path) -> Fallible<Counter> {
        let (pid, name) = (pid.to_string(), file.display().to_string());
        let line = ["perf", "stat", "-x,", "-o", &name, "-e", EVENTS, "-p", &pid].map(str::to_owned);
        let perf = Daemon::start(&line, &file.with_extension("out"))?;
        // It does not say when it is ready.
        std::thread::sleep(Duration::from_millis(300));
        Ok(Counter { perf, file: file.to_owned() })
    }

    /// What was counted.
    pub fn end(self) -> Fallible<Option<(f64, f64)>> {
        self.perf.end(Signal::INT)?;
        Ok(counts(&self.file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_waiting_and_stolen() {
        let stat = "cpu  100 20 300 4000 500 6 7 80 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
        assert_eq!(busy_of(stat), Some(4.33));
        assert_eq!(busy_of("cpu0 1 2 3"), None);
        assert!(machine_busy_secs().unwrap() > 0.0);
    }

    #[test]
    fn counts_are_read() {
        let text = "# started on Mon\n\n1234,,raw_syscalls:sys_enter,5,100.00,,\n56,,context-switches,5,100.00,1,K/sec\n";
        assert_eq!(counts_of(text), Some((1234.0, 56.0)));
        assert_eq!(counts_of("<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n"), None);
        assert_eq!(counts_of(""), None);
    }
}
