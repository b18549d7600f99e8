//! Whether a disk still is where it was: somebody may remove the file that is being written, put another in its place, or
//! cut it, and nothing that is done through the open file tells. A job that ends then would have made a copy that nobody
//! will find, or one of something else. So jobs look before they say that something is so, and now and then meanwhile.

use std::rc::Rc;

use super::{Driver, IoResult};

/// Looks at every file that a disk consists of. Those that are written must be found by their names (`by_name`); all of
/// them, the layers below too, must be as long as they were.
pub async fn check(disk: &Rc<dyn Driver>, by_name: bool) -> IoResult {
    // A file that is the disk itself is as long as that; one that holds an image may grow.
    let mut due = vec![(disk.clone(), by_name, true)];
    while let Some((driver, by_name, exact)) = due.pop() {
        if let Some(check) = driver.check_place(by_name, exact) {
            check.await?;
            continue;
        }
        let layer = driver.as_layer();
        let backing = layer.and_then(|layer| layer.backing());
        let is_image = layer.is_some();
        for child in driver.children() {
            // What lies below is only read.
            let is_below = backing.as_ref().is_some_and(|backing| Rc::ptr_eq(backing, &child));
            let child = child.node().driver().clone();
            let exact = if is_below { true } else { exact && !is_image && child.len() == driver.len() };
            due.push((child, by_name && !is_below, exact));
        }
    }
    Ok(())
}
