//! Guests: they write to the uppermost layer, through our library or by `qemu-io`.

use blockferry::block::{WriteFlags, ZeroFlags};
use blockferry::engine::{Format, ImageOptions};
use blockferry::graph::node::Root;
use blockferry::protocol::open::Cache;

use super::image::Image;
use super::story::{Story, Teller, Told};
use common::image::{Dice, pattern};

/// One change of a disk.
#[derive(Clone, Debug)]
enum Change {
    /// Bytes: all of this value by QEMU, a pattern of this version by us.
    Write { offset: u64, len: u64, value: u8 },
    /// The same, in compressed clusters (QEMU only).
    Compressed { offset: u64, len: u64, value: u8 },
    /// Zeroes, which may be holes.
    Zero { offset: u64, len: u64, unmap: bool },
    /// Zeroes, or what was there.
    Discard { offset: u64, len: u64 },
}

/// A few changes of the uppermost layer.
pub fn change(story: &mut Story, teller: Teller) -> Told<()> {
    let mut image = story.chain.pop().expect("a chain is never empty");
    let told = change_image(story, teller, &mut image, 6);
    story.chain.push(image);
    told
}

/// A few changes of an image that nobody else uses.
pub fn change_image(story: &mut Story, teller: Teller, image: &mut Image, most: u64) -> Told<()> {
    if image.view.len() == 0 {
        return Ok(());
    }
    let mut changes: Vec<Change> =
        (0..1 + story.dice.below(most)).map(|_| any_change(&mut story.dice, teller, image)).collect();
    // Each of these takes a program of its own, which comes before the others.
    changes.sort_by_key(|change| !matches!(change, Change::Compressed { .. }));
    match teller {
        Teller::Us => {
            cut_zeroes(story, image);
            by_us(story, image, &changes)
        }
        Teller::Qemu => by_qemu(story, image, &changes),
    }
}

fn any_change(dice: &mut Dice, teller: Teller, image: &Image) -> Change {
    let len = image.view.len();
    let align = [1, 512, 4096, 65_536, 1 << 20][dice.below(5) as usize];
    let at = dice.below(len);
    let offset = at - at % align;
    // What lies at the end of a disk is where lengths go wrong.
    let longest =
        if dice.below(6) == 0 { len - offset } else { (len - offset).min(1 + dice.below(300 << 10)) };
    let len = (1 + dice.below(longest)).min(1 << 20);
    let value = 1 + dice.below(255) as u8;
    match dice.below(12) {
        0 | 1 => Change::Zero { offset, len, unmap: dice.below(2) == 0 },
        2 => Change::Discard { offset, len },
        3 | 4 if teller == Teller::Qemu => {
            compressed(image, offset, value).unwrap_or(Change::Write { offset, len, value })
        }
        _ => Change::Write { offset, len, value },
    }
}

fn compressed(image: &Image, offset: u64, value: u8) -> Option<Change> {
    let options = image.layout.options().filter(|o| o.data_file.is_none())?;
    let offset = offset - offset % options.cluster_size;
    let len = options.cluster_size.min(image.view.len() - offset);
    Some(Change::Compressed { offset, len, value })
}

/// What was discarded reads as zeroes or as it was; the model takes over which.
fn settle(image: &mut Image, offset: u64, found: &[u8]) -> Told<()> {
    let mut bytes = image.view.read(offset, found.len() as u64);
    for (at, (old, new)) in bytes.iter_mut().zip(found).enumerate() {
        if *new != 0 && *new != *old {
            return Err(format!(
                "{}: byte {} was discarded and is neither 0 nor as it was",
                image.name,
                offset + at as u64
            ));
        }
        *old = *new;
    }
    image.view.write(offset, &bytes);
    Ok(())
}

fn by_qemu(story: &mut Story, image: &mut Image, changes: &[Change]) -> Told<()> {
    let format = image.layout.format();
    let first: Vec<String> = ["-d", "unmap", "-f", format].map(str::to_owned).to_vec();
    let (mut arguments, mut discarded) = (first.clone(), Vec::new());
    for change in changes {
        arguments.push("-c".into());
        arguments.push(match *change {
            Change::Write { offset, len, value } => {
                image.view.write(offset, &vec![value; len as usize]);
                format!("write -q -P {value} {offset} {len}")
            }
            Change::Compressed { offset, len, value } => {
                // QEMU compresses only where the layer holds nothing yet. What it refuses has changed nothing.
                let command = format!("write -q -c -P {value} {offset} {len}");
                let alone = [first.clone(), vec!["-c".into(), command, image.name.clone()]].concat();
                if story.run("qemu-io", &alone).ok {
                    image.view.write(offset, &vec![value; len as usize]);
                }
                arguments.pop();
                continue;
            }
            Change::Zero { offset, len, unmap } => {
                image.view.zero(offset, len);
                format!("write -q -z {}{offset} {len}", if unmap { "-u " } else { "" })
            }
            Change::Discard { offset, len } => {
                discarded.push((offset, len));
                format!("discard -q {offset} {len}")
            }
        });
        if discarded.last().is_some() {
            // What comes after would hide what was discarded.
            break;
        }
    }
    if arguments == first {
        return Ok(());
    }
    arguments.push(image.name.clone());
    let outcome = story.run("qemu-io", &arguments);
    if !outcome.ok || outcome.text.contains("failed") {
        return Err(format!("qemu-io: {}", outcome.text));
    }
    for (offset, len) in discarded {
        let read = ["convert", "-f", format, "-O", "raw", image.name.as_str(), "read"].map(str::to_owned);
        story.must(Teller::Qemu, &read)?;
        story.log.pop();
        let path = story.scratch.path("read");
        let file = std::fs::File::open(&path).expect("what was read");
        let mut found = vec![0; len as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, offset).expect("its bytes");
        std::fs::remove_file(&path).expect("a file that was there");
        settle(image, offset, &found)?;
    }
    Ok(())
}

/// Now and then the file of an image ends inside its last cluster, where nothing but zeroes came: QEMU leaves such files, too.
fn cut_zeroes(story: &mut Story, image: &Image) {
    let Some(options) = image.layout.options().filter(|_| story.aside.below(3) == 0) else { return };
    let file = std::fs::File::options().read(true).write(true).open(story.scratch.path(&image.name));
    let file = file.expect("an image");
    let len = file.metadata().expect("its length").len();
    let last = len.saturating_sub(1) / options.cluster_size * options.cluster_size;
    let mut bytes = vec![0; (len - last) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, last).expect("its last cluster");
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at as u64 + 1);
    // The first sector stays: a cluster that is not there at all is another matter.
    let end = last + used.max(512).next_multiple_of(512);
    if last > 0 && end < len {
        file.set_len(end).expect("another length");
        story.log.push(format!("truncate -s {end} {}", image.name));
    }
}

/// Opens the image as an embedder does, changes it, and reads back what was changed before it is closed.
fn by_us(story: &mut Story, image: &mut Image, changes: &[Change]) -> Told<()> {
    let (ring, seed) = (story.ring(), story.dice.next());
    story.log.push(format!("# our guest, on {}: {changes:?}", image.name));
    let format = image.layout.of_ours();
    let direct = format == Format::Qcow2 && seed % 2 == 1;
    let cache = if direct { Cache::Direct } else { Cache::Buffered };
    let options = ImageOptions { format: Some(format), cache, ..ImageOptions::default() };
    let path = story.scratch.path(&image.name);
    let (mut told, changes, r) = (image.clone(), changes.to_vec(), ring.clone());
    let told = ring.block_on(async move {
        let fail = |error: blockferry::block::BlockError| error.to_string();
        let driver = blockferry::engine::open::open(&r, &path, &options).await.map_err(fail)?;
        let node = driver.called(path.as_str());
        let root = Root::new(&node, false).map_err(fail)?;
        for (version, change) in changes.iter().enumerate() {
            let (offset, len) = match *change {
                Change::Write { offset, len, .. } | Change::Compressed { offset, len, .. } => {
                    let mut bytes = vec![0; len as usize];
                    pattern(offset, seed.wrapping_add(version as u64), &mut bytes);
                    told.view.write(offset, &bytes);
                    let mut buf = r.alloc(bytes.len()).await;
                    buf.copy_from(0, &bytes);
                    root.write(offset, buf.freeze(), WriteFlags { fua: version % 5 == 4 })
                        .await
                        .map_err(fail)?;
                    (offset, len)
                }
                Change::Zero { offset, len, unmap } => {
                    told.view.zero(offset, len);
                    let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
                    root.write_zeroes(offset, len, flags).await.map_err(fail)?;
                    (offset, len)
                }
                Change::Discard { offset, len } => {
                    root.discard(offset, len).await.map_err(fail)?;
                    let (buf, result) = root.read(offset, r.alloc(len as usize).await).await;
                    result.map_err(fail)?;
                    settle(&mut told, offset, buf.as_slice())?;
                    (offset, len)
                }
            };
            let (buf, result) = root.read(offset, r.alloc(len as usize).await).await;
            result.map_err(fail)?;
            if buf.as_slice() != told.view.read(offset, len) {
                return Err(format!("our guest reads something else than it wrote: {change:?}"));
            }
        }
        root.flush().await.map_err(fail)?;
        Ok(told)
    })?;
    *image = told;
    Ok(())
}
