//! The steps of a story. Each changes the images by one of the two programs, and the model with them; what it gives back are
//! the layers that were changed.

use super::guest;
use super::image::{Image, Layout, Options, any_len};
use super::story::{Story, Teller, Told, program_of};

/// All kinds; each occurs in a run of some size.
pub const KINDS: [&str; 11] = [
    "write", "overlay", "resize", "rebase", "commit", "stream", "convert", "mirror", "snapshot", "check",
    "refuse",
];

/// How many layers a chain has at most.
const LAYERS_MAX: usize = 6;

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|text| (*text).to_owned()).collect()
}

/// One step of any kind. A kind that the chain has no room for becomes a write.
pub fn any(story: &mut Story) -> Told<Vec<usize>> {
    let teller = story.anyone();
    let layers = story.chain.len();
    let last = layers - 1;
    let is_qcow2 = story.top().layout != Layout::Raw;
    let only_us = Teller::Us;
    let (kind, teller) = match story.dice.below(40) {
        0..4 if layers < LAYERS_MAX => ("overlay", teller),
        4..7 if story.top().snapshots.is_empty() => ("resize", teller),
        7..13 if is_qcow2 && can_have_backing(&story.top().layout) => ("rebase", teller),
        13..17 if layers > 1 => ("commit", teller),
        17..20 if layers > 1 => ("stream", only_us),
        20..23 => ("convert", teller),
        23..25 => ("mirror", only_us),
        25..29 if story.top().takes_snapshots() => ("snapshot", teller),
        29 => ("check", only_us),
        30 | 31 => ("refuse", only_us),
        _ => ("write", teller),
    };
    let kind = if story.without.iter().any(|left_out| left_out == kind) { "write" } else { kind };
    story.count(kind, teller);
    match kind {
        "overlay" => overlay(story, teller).map(|()| vec![last + 1]),
        "resize" => resize(story, teller).map(|()| vec![last]),
        "rebase" => rebase(story, teller).map(|()| vec![story.chain.len() - 1]),
        "commit" => commit(story, teller),
        "stream" => stream(story),
        "convert" => convert(story, teller).map(|()| vec![story.chain.len() - 1]),
        "mirror" => mirror(story).map(|()| vec![story.chain.len() - 1]),
        "snapshot" => snapshot(story, teller).map(|()| vec![last]),
        "check" => check(story).map(|()| Vec::new()),
        "refuse" => refuse(story).map(|()| (0..layers).collect()),
        _ => guest::change(story, teller).map(|()| vec![last]),
    }
}

/// A raw data file shows by itself what the disk shows, so that nothing may lie below.
fn can_have_backing(layout: &Layout) -> bool {
    layout.options().is_some_and(|o| !o.data_file.as_ref().is_some_and(|(_, raw)| *raw))
}

/// Makes a new image, over `backing` if there is one.
pub fn create(
    story: &mut Story,
    teller: Teller,
    layout: Layout,
    len: u64,
    backing: Option<&Image>,
) -> Told<Image> {
    let name = story.name_for(layout.format());
    let mut arguments = words(&["create", "-q", "-f", layout.format()]);
    arguments.extend(layout.arguments());
    let mut view = super::view::View::zeroes(layout.whole(len));
    if let Some(backing) = backing {
        arguments.extend(words(&["-b", &backing.name, "-F", backing.layout.format()]));
        view = backing.view.clone();
        view.resize(layout.whole(len));
    }
    arguments.extend([name.clone(), len.to_string()]);
    story.must(teller, &arguments)?;
    let mut image = Image { name, layout, view, snapshots: Vec::new() };
    story.adopt_len(&mut image, len)?;
    Ok(image)
}

/// A new layer on top, as long as the one below, shorter, or longer.
pub fn overlay(story: &mut Story, teller: Teller) -> Told<()> {
    let below = story.top().clone();
    let len = match story.dice.below(3) {
        0 => below.view.len(),
        1 => any_len(&mut story.dice, story.large),
        _ => below.view.len() + story.dice.below(200_000),
    };
    let layout = story.any_layout(len, true);
    let image = create(story, teller, layout, len, Some(&below))?;
    story.chain.push(image);
    Ok(())
}

/// Another length of the uppermost layer.
fn resize(story: &mut Story, teller: Teller) -> Told<()> {
    let mut len = any_len(&mut story.dice, story.large);
    if story.dice.below(2) == 0 {
        len = story.top().view.len() + story.dice.below(1 << 20);
    }
    let image = story.top().clone();
    // QEMU leaves what lies behind the end in the last cluster (of a disk that was longer, or copied from what lay below),
    // and shows it when the disk grows.
    let cluster = image.layout.options().map_or(512, |o| o.cluster_size);
    let grows = len > image.view.len();
    let whole = len.next_multiple_of(if grows { 512 } else { cluster });
    let shows_rest = if grows { !image.view.len().is_multiple_of(cluster) } else { whole > image.view.len() };
    let teller = if shows_rest { Teller::Us } else { teller };
    if teller == Teller::Qemu {
        len = whole;
    }
    let mut arguments = words(&["resize", "-q", "-f", image.layout.format()]);
    if len < image.view.len() {
        arguments.push("--shrink".into());
    }
    arguments.extend([image.name.clone(), len.to_string()]);
    // What lies below would show in the part that is added. Version 2 has no zeroes to hide it with, and QEMU cannot
    // zero parts of clusters with subclusters.
    let shows = story.chain.iter().rev().skip(1).any(|below| below.view.len() > image.view.len());
    let cannot_hide = |o: &Options| !o.v3 || (o.extended_l2 && teller == Teller::Qemu);
    if image.layout.options().is_some_and(cannot_hide) && shows && len > image.view.len() {
        if !story.may(teller, &arguments) {
            return Ok(());
        }
    } else {
        story.must(teller, &arguments)?;
    }
    let mut image = story.chain.pop().expect("a chain is never empty");
    image.view.resize(image.layout.whole(len));
    let told = story.adopt_len(&mut image, len);
    story.chain.push(image);
    told
}

/// Another backing file for the uppermost layer: none, one further down, or one that has nothing to do with it.
fn rebase(story: &mut Story, teller: Teller) -> Told<()> {
    let last = story.chain.len() - 1;
    // QEMU's tool loses zeroes of an image that had no backing file before.
    let teller = if last == 0 { Teller::Us } else { teller };
    let name = story.top().name.clone();
    let mut arguments = words(&["rebase", "-q", "-f", "qcow2"]);
    let keep = match story.dice.below(3) {
        0 => 0,
        1 if last > 0 => 1 + story.dice.below(last as u64) as usize,
        _ => {
            let len = match story.dice.below(3) {
                0 => story.top().view.len(),
                _ => any_len(&mut story.dice, story.large),
            };
            let other = story.fresh_image(len)?;
            arguments.extend(words(&["-b", &other.name, "-F", other.layout.format(), &name]));
            story.must(teller, &arguments)?;
            drop_below(story, last, 0);
            story.chain.insert(0, other);
            return Ok(());
        }
    };
    match keep {
        0 => arguments.extend(words(&["-b", "", &name])),
        n => {
            let below = &story.chain[n - 1];
            arguments.extend(words(&["-b", &below.name, "-F", below.layout.format(), &name]));
        }
    }
    story.must(teller, &arguments)?;
    drop_below(story, last, keep);
    Ok(())
}

/// The layers from `keep` to below `layer` are no longer part of the chain.
fn drop_below(story: &mut Story, layer: usize, keep: usize) {
    let dropped: Vec<Image> = story.chain.drain(keep..layer).collect();
    dropped.iter().for_each(|image| story.forget(image));
    story.chain[keep].below_has_changed();
}

/// The layers above `base` are no longer part of the chain.
fn drop_above(story: &mut Story, base: usize) {
    let dropped: Vec<Image> = story.chain.drain(base + 1..).collect();
    dropped.iter().for_each(|image| story.forget(image));
}

/// Layers go down into one of those below.
fn commit(story: &mut Story, teller: Teller) -> Told<Vec<usize>> {
    let last = story.chain.len() - 1;
    let base = story.dice.below(last as u64) as usize;
    // A base that grows shows what QEMU left behind its end in the last cluster, as in `resize`.
    let cluster = story.chain[base].layout.options().map_or(1, |o| o.cluster_size);
    let shows_rest = story.chain[last].view.len() > story.chain[base].view.len()
        && !story.chain[base].view.len().is_multiple_of(cluster);
    let teller = if shows_rest { Teller::Us } else { teller };
    // Of ours, some layer in the middle may be the upper end.
    let top =
        if teller == Teller::Us { base + 1 + story.dice.below((last - base) as u64) as usize } else { last };
    let grows = story.chain[top].view.len() > story.chain[base].view.len();
    let (name, below) = (story.chain[last].name.clone(), story.chain[base].name.clone());
    let empties = top == last && base + 1 == last && story.dice.below(2) == 0;
    let mut arguments = words(&["commit", "-q", "-f", story.chain[last].layout.format()]);
    match teller {
        Teller::Us if top < last => {
            let top = story.chain[top].name.clone();
            arguments.extend(words(&["--top", &top, "--base", &below]));
        }
        Teller::Us if empties => {}
        Teller::Us => arguments.extend(words(&["--base", &below])),
        Teller::Qemu if empties => {}
        Teller::Qemu => arguments.extend(words(&["-b", &below])),
    }
    arguments.push(name);
    // An image with snapshots may be unable to grow, and one of version 2 to hide what shows then.
    let v2 = story.chain[base].layout.options().is_some_and(|o| !o.v3);
    if grows && (v2 || !story.chain[base].snapshots.is_empty()) {
        if !story.may(teller, &arguments) {
            // Who has failed may have begun: what the base shows is not known any more, and it is not looked at again.
            return abandon(story, base);
        }
    } else {
        story.must(teller, &arguments)?;
    }
    let mut merged = story.chain[top].view.over(&story.chain[base].view);
    let end = story.chain[top].view.len();
    if let Some(above) = story.chain.get(top + 1) {
        // Where a short layer hid what lies below it, the one above goes on to show zeroes.
        let shown = above.view.len().min(merged.len());
        merged.zero(end.min(shown), shown.saturating_sub(end));
    }
    story.chain[base].view = merged;
    let stored = story.stored_len(&story.chain[base]);
    let in_sectors = stored.next_multiple_of(512);
    if teller == Teller::Qemu
        && stored < story.chain[base].view.len()
        && in_sectors >= story.chain[base].view.len()
    {
        // For QEMU a raw file is of whole sectors already. It does not grow for zeroes.
        let lost = story.chain[base].view.read(stored, story.chain[base].view.len() - stored);
        if lost.iter().any(|byte| *byte != 0) {
            return Err("the end of the last sector is lost".into());
        }
        story.chain[base].view.resize(stored);
    }
    if top < last {
        drop_below(story, top + 1, base + 1);
        return Ok(vec![base, base + 1]);
    }
    // The uppermost shows what it showed, over a base that shows the same; those between make no sense any more.
    if base + 1 < last || story.dice.below(2) == 0 {
        drop_above(story, base);
        return Ok(vec![base]);
    }
    story.chain[last].below_has_changed();
    Ok(vec![base, last])
}

/// A commit that may be refused was: the uppermost shows what it did.
fn abandon(story: &mut Story, base: usize) -> Told<Vec<usize>> {
    let last = story.chain.len() - 1;
    let name = story.chain[last].name.clone();
    if !can_have_backing(&story.chain[last].layout) {
        return Ok(Vec::new());
    }
    story.must(Teller::Qemu, &words(&["rebase", "-q", "-f", "qcow2", "-b", "", &name]))?;
    drop_below(story, last, 0);
    let _ = base;
    Ok(vec![0])
}

/// Backing data goes up.
fn stream(story: &mut Story) -> Told<Vec<usize>> {
    let last = story.chain.len() - 1;
    let top = 1 + story.dice.below(last as u64) as usize;
    let keep = story.dice.below(top as u64 + 1) as usize;
    let name = story.chain[last].name.clone();
    let mut arguments = words(&["stream", "-q", "-f", story.chain[last].layout.format()]);
    if top < last {
        arguments.extend(words(&["--top", &story.chain[top].name]));
    }
    if keep == top {
        // Nothing lies between: that is what it says, or it is done.
        arguments.extend(words(&["--base", &story.chain[keep - 1].name, &name]));
        story.may(Teller::Us, &arguments);
        return Ok(vec![top]);
    }
    if keep > 0 {
        arguments.extend(words(&["--base", &story.chain[keep - 1].name]));
    }
    arguments.push(name);
    story.must(Teller::Us, &arguments)?;
    drop_below(story, top, keep);
    Ok(vec![keep])
}

/// The disk goes on in a new image, of another layout.
fn convert(story: &mut Story, teller: Teller) -> Told<()> {
    let source = story.top().clone();
    let over = story.chain.len() > 1 && story.dice.below(3) == 0;
    let compress = story.dice.below(3) == 0;
    let mut layout = story.any_layout(source.view.len(), over);
    let mut arguments = words(&["convert", "-q", "-f", source.layout.format(), "-O", layout.format()]);
    if let Layout::Qcow2(options) = &mut layout
        && compress
    {
        options.data_file = None;
        options.preallocated = false;
        arguments.push("-c".into());
    }
    // All of a disk of gigabytes is too much to write.
    if story.dice.below(4) == 0 && !story.large {
        arguments.extend(words(&["-S", ["0", "4k", "64k"][story.dice.below(3) as usize]]));
    }
    arguments.extend(layout.arguments());
    if over {
        let below = &story.chain[story.chain.len() - 2];
        arguments.extend(words(&["-B", &below.name, "-F", below.layout.format()]));
    }
    let name = story.name_for(layout.format());
    arguments.extend([source.name.clone(), name.clone()]);
    story.must(teller, &arguments)?;
    go_on_in(story, Image { name, layout, view: source.view, snapshots: Vec::new() }, over)
}

/// The disk is mirrored to a new image, verified, and goes on there.
fn mirror(story: &mut Story) -> Told<()> {
    let source = story.top().clone();
    let layout = match story.dice.below(2) {
        0 => Layout::Raw,
        _ => Layout::Qcow2(Options {
            v3: true,
            cluster_size: 65_536,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            zstd: false,
            data_file: None,
            preallocated: false,
        }),
    };
    let name = story.name_for(layout.format());
    let mut arguments = words(&["mirror", "-q", "-f", source.layout.format(), "-F", layout.format()]);
    if story.dice.below(2) == 0 {
        arguments.push("--verify".into());
    }
    arguments.extend([source.name.clone(), name.clone()]);
    story.must(Teller::Us, &arguments)?;
    go_on_in(story, Image { name, layout, view: source.view, snapshots: Vec::new() }, false)
}

/// `image` takes the place of the uppermost layer (`over` the same below it), or of the whole chain.
fn go_on_in(story: &mut Story, mut image: Image, over: bool) -> Told<()> {
    let len = image.view.len();
    story.adopt_len(&mut image, len)?;
    let keep = if over { story.chain.len() - 1 } else { 0 };
    let dropped: Vec<Image> = story.chain.drain(keep..).collect();
    dropped.iter().for_each(|image| story.forget(image));
    story.chain.push(image);
    Ok(())
}

/// A snapshot is taken, applied, or deleted.
fn snapshot(story: &mut Story, teller: Teller) -> Told<()> {
    let name = story.top().name.clone();
    let count = story.top().snapshots.len() as u64;
    let which = if count > 0 { story.dice.below(count) as usize } else { 0 };
    let mut arguments = words(&["snapshot"]);
    match story.dice.below(3) {
        0 if count > 0 => {
            let (snapshot, view) = story.top().snapshots[which].clone();
            let Some(view) = view else { return Ok(()) };
            arguments.extend(words(&["-a", &snapshot, &name]));
            story.must(teller, &arguments)?;
            story.top().view = view;
        }
        1 if count > 0 => {
            let (snapshot, _) = story.top().snapshots.remove(which);
            arguments.extend(words(&["-d", &snapshot, &name]));
            story.must(teller, &arguments)?;
        }
        // Three copies of a cluster and the disk's own are what eight bits count with ease.
        _ if count < 3 => {
            let snapshot = story.new_name("s");
            arguments.extend(words(&["-c", &snapshot, &name]));
            story.must(teller, &arguments)?;
            let view = story.top().view.clone();
            story.top().snapshots.push((snapshot, Some(view)));
        }
        _ => {}
    }
    Ok(())
}

/// Our check finds nothing in any layer.
fn check(story: &mut Story) -> Told<()> {
    for layer in 0..story.chain.len() {
        if story.chain[layer].layout != Layout::Raw {
            let name = story.chain[layer].name.clone();
            story.must(Teller::Us, &words(&["check", "-q", "-f", "qcow2", &name]))?;
        }
    }
    Ok(())
}

/// Something that would destroy the disk is asked for with force. It has to be refused before anything has changed.
fn refuse(story: &mut Story) -> Told<()> {
    let layers = story.chain.len();
    let (top, victim) = (story.top().clone(), story.dice.below(layers as u64) as usize);
    let victim = story.chain[victim].clone();
    let file = victim.files().pop().expect("an image has a file");
    let alias = story.new_name("alias");
    let (path, other) = (story.scratch.path(&file), story.scratch.path(&alias));
    let target = match story.dice.below(4) {
        0 => {
            std::fs::hard_link(&path, &other).expect("a link");
            alias.clone()
        }
        1 => {
            std::os::unix::fs::symlink(&path, &other).expect("a link");
            alias.clone()
        }
        2 => format!("./{file}"),
        _ => file.clone(),
    };
    let output = ["raw", "qcow2"][story.dice.below(2) as usize];
    let before: Vec<Vec<u8>> = if story.large { Vec::new() } else { contents(story) };
    let arguments = match story.dice.below(3) {
        0 => words(&[
            "create",
            "-q",
            "--force",
            "-f",
            "qcow2",
            "-b",
            &top.name,
            "-F",
            top.layout.format(),
            &target,
        ]),
        1 => words(&["mirror", "-q", "--force", "-f", top.layout.format(), "-F", output, &top.name, &target]),
        _ => {
            words(&["convert", "-q", "--force", "-f", top.layout.format(), "-O", output, &top.name, &target])
        }
    };
    let done = story.run(program_of(Teller::Us), &arguments).ok;
    if target == alias {
        std::fs::remove_file(&other).expect("the link is there");
    }
    if done {
        return Err("what destroys the disk was done".into());
    }
    if !story.large && contents(story) != before {
        return Err("it was refused, and files have changed".into());
    }
    Ok(())
}

fn contents(story: &Story) -> Vec<Vec<u8>> {
    let files = story.chain.iter().flat_map(Image::files);
    files.map(|file| std::fs::read(story.scratch.path(&file)).expect("a file of the chain")).collect()
}
