//! Who is there: the jobs of an engine by id, newest first.
//!
//! The rules of ids are QEMU's (a letter, then letters, digits, `-`, `.`, `_`), with a length that it does not
//! limit and this engine does. A job stays listed, concluded or not, until it is dismissed and its owner takes it out.
//! The table is a plain vector: an engine has few jobs, and the order of the list is the order of their making.

use super::error::JobError;

/// The longest id, in bytes.
pub const JOB_ID_LEN_MAX: usize = 127;
/// How many jobs an engine holds, concluded ones included.
pub const JOBS_MAX: usize = 1024;

/// True when `id` keeps the rules of ids.
pub fn id_is_well_formed(id: &str) -> bool {
    id.len() <= JOB_ID_LEN_MAX
        && id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

/// The jobs of an engine. `J` is whatever the owner keeps for each.
#[derive(Debug)]
pub struct Registry<J> {
    oldest_first: Vec<(String, J)>,
}

impl<J> Default for Registry<J> {
    fn default() -> Self {
        Self { oldest_first: Vec::new() }
    }
}

impl<J> Registry<J> {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a new job may be called `id`. Ask before the job is made, so that a refusal leaves no trace.
    pub fn check_new_id(&self, id: &str) -> Result<(), JobError> {
        if !id_is_well_formed(id) {
            return Err(JobError::InvalidId { id: id.to_owned() });
        }
        if self.get(id).is_some() {
            return Err(JobError::IdInUse { id: id.to_owned() });
        }
        if self.oldest_first.len() >= JOBS_MAX {
            return Err(JobError::TooManyJobs { limit: JOBS_MAX });
        }
        Ok(())
    }

    /// Adds a job under a new id.
    pub fn insert(&mut self, id: &str, job: J) -> Result<(), JobError> {
        self.check_new_id(id)?;
        self.oldest_first.push((id.to_owned(), job));
        Ok(())
    }

    /// The job called `id`.
    pub fn get(&self, id: &str) -> Option<&J> {
        self.oldest_first.iter().find(|(name, _)| name == id).map(|(_, job)| job)
    }

    /// The job called `id`, to be changed.
    pub fn get_mut(&mut self, id: &str) -> Option<&mut J> {
        self.oldest_first.iter_mut().find(|(name, _)| name == id).map(|(_, job)| job)
    }

    /// Takes a job out.
    pub fn remove(&mut self, id: &str) -> Option<J> {
        let index = self.oldest_first.iter().position(|(name, _)| name == id)?;
        Some(self.oldest_first.remove(index).1)
    }

    /// All jobs, newest first.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &J)> {
        self.oldest_first.iter().rev().map(|(id, job)| (id.as_str(), job))
    }

    /// All jobs, newest first, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut J)> {
        self.oldest_first.iter_mut().rev().map(|(id, job)| (id.as_str(), job))
    }

    /// How many jobs there are.
    pub fn len(&self) -> usize {
        self.oldest_first.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.oldest_first.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_the_rules() {
        let longest = "a".repeat(JOB_ID_LEN_MAX);
        for good in ["a", "Z9", "mirror-vda.1_x", longest.as_str()] {
            assert!(id_is_well_formed(good), "{good}");
        }
        let too_long = "a".repeat(JOB_ID_LEN_MAX + 1);
        for bad in ["", "1a", "-a", "_a", "#block1", "a b", "a/b", "a\0", "é", "aé", too_long.as_str()] {
            assert!(!id_is_well_formed(bad), "{bad}");
        }
    }

    #[test]
    fn refusals_say_why() {
        let mut jobs = Registry::new();
        assert_eq!(jobs.insert("", 0).unwrap_err().to_string(), "Invalid job ID ''");
        assert_eq!(jobs.insert("1k", 0).unwrap_err().to_string(), "Invalid job ID '1k'");
        jobs.insert("k", 1).unwrap();
        assert_eq!(jobs.insert("k", 2).unwrap_err().to_string(), "Job ID 'k' already in use");
        assert_eq!((jobs.len(), jobs.get("k")), (1, Some(&1)));
    }

    #[test]
    fn an_id_is_free_again_after_removal() {
        let mut jobs = Registry::new();
        jobs.insert("k", 1).unwrap();
        assert_eq!(jobs.remove("k"), Some(1));
        assert_eq!(jobs.remove("k"), None);
        assert!(jobs.is_empty());
        jobs.insert("k", 2).unwrap();
        *jobs.get_mut("k").unwrap() += 1;
        assert_eq!(jobs.get("k"), Some(&3));
    }

    #[test]
    fn the_newest_comes_first() {
        let mut jobs = Registry::new();
        for id in ["a", "b", "c", "d"] {
            jobs.insert(id, ()).unwrap();
        }
        jobs.remove("b");
        assert_eq!(jobs.iter().map(|(id, ())| id).collect::<Vec<_>>(), ["d", "c", "a"]);
        assert_eq!(jobs.iter_mut().map(|(id, ())| id.to_owned()).collect::<Vec<_>>(), ["d", "c", "a"]);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut jobs = Registry::new();
        for n in 0..JOBS_MAX {
            jobs.insert(&format!("j{n}"), ()).unwrap();
        }
        assert_eq!(jobs.insert("one-more", ()), Err(JobError::TooManyJobs { limit: JOBS_MAX }));
        jobs.remove("j5");
        jobs.insert("one-more", ()).unwrap();
    }
}
