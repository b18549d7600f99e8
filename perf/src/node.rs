//! Random reads of 4 KiB at depth 32 from a device that each program opens itself: what the layers between a request and
//! the ring cost.

use std::path::Path;

use serde_json::Value;

use crate::disks::{Content, Loop, Mount, drop_cache};
use crate::nbd::own_report;
use crate::process::{counted, counts, machine_busy_secs, run as run_tool};
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, copy};

/// How many reads a run makes.
const READS: u64 = 400_000;

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes = if cx.quick { 512 << 20 } else { 4u64 << 30 };
    let reads = if cx.quick { READS / 8 } else { READS };
    let tmpfs = Mount::tmpfs(&cx.folder.join("tmpfs"), bytes + (64 << 20))?;
    let disk = Loop::new(&tmpfs.path().join("disk.img"), bytes)?;
    Content::Random(1).fill(disk.path(), bytes)?;
    // A stride that is odd in pages and not far from the size: each read lies elsewhere, all of them on the disk.
    let step = (bytes - 1_048_576) / 4096 * 4096 + 4096;
    let fio = "fio --name=c --ioengine=io_uring --fixedbufs --registerfiles --rw=randread --bs=4k --iodepth=32 \
               --iodepth_batch_complete_max=32 --direct=1 --norandommap --randrepeat=0 --output-format=json";
    let lines = [
        (
            "blockferry bench",
            Role::Ours,
            format!("blockferry --json --stats bench --quiet -d 32 -p 100 -n {reads} DEV"),
        ),
        (
            "qemu-img bench, io_uring",
            Role::Peer,
            format!("qemu-img bench -f raw -t none -i io_uring -c {reads} -d 32 -s 4096 -S {step} DEV"),
        ),
        (
            "qemu-img bench, native",
            Role::Peer,
            format!("qemu-img bench -f raw -t none -i native -c {reads} -d 32 -s 4096 -S {step} DEV"),
        ),
        (
            "fio, io_uring with registered files and buffers",
            Role::Limit,
            format!("{fio} --number_ios={reads} --size=100% --io_size={} --filename=DEV", reads * 4096),
        ),
    ];
    let load = Load {
        disk: disk.path(),
        folder: &cx.folder,
        blockferry: &cx.blockferry,
        operations: reads,
        count: cx.counted,
    };
    let entries: Vec<Contender<'_>> =
        lines.into_iter().map(|(name, role, command)| load.contender(name, role, command)).collect();
    let limits = (cx.rounds.unwrap_or(if cx.quick { 2 } else { 10 }), cx.seconds_max, cx.only.as_slice());
    interleave(&mut cx.sink, limits, (scenario, ""), entries)
}

/// What programs do that open a disk themselves.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// What DEV in a command stands for.
    pub disk: &'a Path,
    pub folder: &'a Path,
    /// The program under test.
    pub blockferry: &'a str,
    /// How many reads or writes a run makes.
    pub operations: u64,
    /// Whether system calls can be counted.
    pub count: bool,
}

impl<'a> Load<'a> {
    /// One who does it.
    pub fn contender(self, name: &str, role: Role, command: String) -> Contender<'a> {
        let (name, shown) = (name.to_owned(), command.clone());
        let who = name.clone();
        let run = move |warm_up: bool| self.run(&who, role, &command, warm_up);
        Contender { name, role, command: shown, run: Box::new(run) }
    }

    fn run(&self, name: &str, role: Role, command: &str, warm_up: bool) -> Fallible<Values> {
        drop_cache(self.disk)?;
        let mut line: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if role == Role::Ours {
            line[0] = self.blockferry.to_owned();
        }
        line.iter_mut().for_each(|word| *word = word.replace("DEV", &self.disk.display().to_string()));
        let (count, file) = (warm_up && self.count, self.folder.join("counts"));
        if count {
            line = counted(&line, &file);
        }
        let busy = machine_busy_secs()?;
        let ended = run_tool(&line, &self.folder.join("tool.out"), &|| Ok(()))?;
        let busy = machine_busy_secs()? - busy;
        let mut values = Values::new();
        let cpu = ended.usage.user_secs + ended.usage.sys_secs;
        let all = self.operations as f64;
        let mut put = |name: &str, value: f64| values.insert(name.to_owned(), value);
        put("iops", all / inner_secs(name, &ended.stdout).unwrap_or(ended.wall_secs));
        put("cpu-us-an-io", cpu * 1e6 / all);
        put("busy-us-an-io", busy * 1e6 / all);
        put("rss-mib", ended.usage.rss_kib_max as f64 / 1024.0);
        if let Some((syscalls, switches)) = counts(&file).filter(|_| count) {
            put("syscalls-an-io", syscalls / all);
            put("switches-an-io", switches / all);
        }
        if role == Role::Ours {
            copy::add_own_counters(&mut values, &ended.stdout);
            values.extend(own_report(&ended.stdout)?.into_iter().filter(|(name, _)| name.starts_with('p')));
        }
        Ok(values)
    }
}

/// The seconds that a program says its requests took; starting up is not part of an I/O.
fn inner_secs(name: &str, stdout: &str) -> Option<f64> {
    if name.starts_with("qemu") {
        let line = stdout.lines().find(|line| line.starts_with("Run completed in "))?;
        return line.split_whitespace().nth(3)?.parse().ok();
    }
    if name.starts_with("fio") {
        let report: Value = serde_json::from_str(&stdout[stdout.find('{')?..]).ok()?;
        let job = &report["jobs"][0];
        let runtime = |way: &str| job[way]["runtime"].as_f64().filter(|ms| *ms > 0.0);
        return Some(runtime("read").or_else(|| runtime("write"))? / 1e3);
    }
    let lines = stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let report = lines.rev().find(|line| line["event"] == "report")?;
    Some(report["report"]["elapsed-ns"].as_f64()? / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_found_where_each_program_says_them() {
        let qemu = "Sending 5 read requests\nRun completed in 1.250 seconds.\n";
        assert_eq!(inner_secs("qemu-img bench", qemu), Some(1.25));
        assert_eq!(inner_secs("fio", "{\"jobs\":[{\"read\":{\"runtime\":1500}}]}"), Some(1.5));
        let own = "{\"event\":\"report\",\"report\":{\"elapsed-ns\":2000000000}}";
        assert_eq!(inner_secs("blockferry", own), Some(2.0));
        assert_eq!(inner_secs("blockferry", ""), None);
    }
}
