//! qemu-storage-daemon, driven over its monitor: the peer whose mirror is what ours is compared with.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::Daemon;
use crate::{Fallible, stop};

/// A monitor's connection: commands, their answers, and the events that came in between.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: Vec<Value>,
    /// The daemon's standard error.
    complaints: PathBuf,
}

impl Monitor {
    fn connect(socket: &Path, complaints: &Path) -> Fallible<Monitor> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut monitor =
            Monitor { stream, buffer: Vec::new(), events: Vec::new(), complaints: complaints.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(5);
        monitor.next(deadline)?.ok_or("no greeting from the monitor")?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// The next line, until the deadline.
    fn next(&mut self, deadline: Instant) -> Fallible<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            stop::check()?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    // It says why on standard error, but perhaps a little later than it closes the socket.
                    std::thread::sleep(Duration::from_millis(50));
                    let said = std::fs::read_to_string(&self.complaints).unwrap_or_default();
                    return Err(format!("qemu-storage-daemon has crashed: {}", said.trim()).into());
                }
                Ok(n) => self.buffer.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Carries out a command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Fallible<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes())?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Some(answer) = self.next(deadline)? {
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            } else {
                return Err(format!("{command}: {}", answer["error"]["desc"]).into());
            }
        }
        Err(format!("{command}: no answer").into())
    }

    /// Waits for one of these events; `None` at the deadline.
    pub fn event(&mut self, names: &[&str], deadline: Instant) -> Fallible<Option<Value>> {
        let is_wanted = |event: &Value| event["event"].as_str().is_some_and(|name| names.contains(&name));
        if let Some(event) = self.events.drain(..).find(is_wanted) {
            return Ok(Some(event));
        }
        while let Some(line) = self.next(deadline)? {
            if is_wanted(&line) {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}

/// The daemon and its monitor.
#[derive(Debug)]
pub struct Qsd {
    pub monitor: Monitor,
    pub daemon: Daemon,
}

/// How it opens a disk, as shown in reports.
pub fn node(name: &str, path: &Path, aio: &str) -> Fallible<Value> {
    use std::os::unix::fs::FileTypeExt;
    let is_device = std::fs::metadata(path)?.file_type().is_block_device();
    Ok(json!({
        "driver": "raw", "node-name": name,
        "file": {
            "driver": if is_device { "host_device" } else { "file" },
            "node-name": format!("{name}-file"),
            "filename": path.display().to_string(),
            "aio": aio,
            "cache": {"direct": true, "no-flush": false},
            "discard": "unmap",
        },
    }))
}

impl Qsd {
    /// Starts one, with what goes before its command line (`taskset`) and after it.
    pub fn start(folder: &Path, before: &[String], after: &[String]) -> Fallible<Qsd> {
        let socket = folder.join("qmp.sock");
        let _ = std::fs::remove_file(&socket);
        let mut line = before.to_vec();
        line.extend(["qemu-storage-daemon".to_owned(), "--chardev".into()]);
        line.push(format!("socket,path={},server=on,wait=off,id=c", socket.display()));
        line.extend(["--monitor".to_owned(), "chardev=c".into()]);
        line.extend_from_slice(after);
        let daemon = Daemon::start(&line, &folder.join("qsd.out"))?;
        let complaints = folder.join("qsd.err");
        let connect = || Ok(Monitor::connect(&socket, &complaints).ok());
        let monitor = daemon.until(Duration::from_secs(5), Duration::from_millis(2), connect)?;
        Ok(Qsd { monitor: monitor.ok_or("no monitor of qemu-storage-daemon")?, daemon })
    }

    /// Waits until a job is ready; false at the deadline, an error when it has ended instead.
    pub fn until_ready(&mut self, deadline: Instant) -> Fallible<bool> {
        match self.monitor.event(&["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"], deadline)? {
            None => Ok(false),
            Some(event) if event["event"] == "BLOCK_JOB_READY" => Ok(true),
            Some(event) => {
                Err(format!("the job ended instead of becoming ready: {}", event["data"]["error"]).into())
            }
        }
    }

    /// Ends a job, whatever state it is in, and waits until it is gone.
    pub fn cancel(&mut self, job: &str) -> Fallible<()> {
        self.monitor.execute("block-job-cancel", json!({"device": job, "force": true}))?;
        let deadline = Instant::now() + Duration::from_secs(30);
        self.monitor.event(&["BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"], deadline)?;
        Ok(())
    }
}
