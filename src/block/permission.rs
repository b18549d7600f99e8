//! Permissions: what a user of an image does with it, and what it lets others do meanwhile.
//!
//! The model and the numbers are QEMU's, because they are also the numbers of the lock bytes by which
//! programs on one machine keep out of each other's way: byte `100 + n` is locked (shared) by who uses
//! permission `n`, byte `200 + n` by who does not let others use it.

/// One permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Permission {
    /// Read and rely on what is read.
    ConsistentRead = 0,
    /// Write.
    Write = 1,
    /// Write without changing what is read.
    WriteUnchanged = 2,
    /// Change the length.
    Resize = 3,
}

impl Permission {
    /// All of them.
    pub const ALL: [Permission; 4] =
        [Permission::ConsistentRead, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

    /// The name that QEMU's messages use.
    pub fn name(self) -> &'static str {
        match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::WriteUnchanged => "write unchanged",
            Permission::Resize => "resize",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A set of permissions in use, and of those that others may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    used: u8,
    shared: u8,
}

impl Permissions {
    /// Nothing is done, everything is allowed: no locks.
    pub const NONE: Permissions = Permissions { used: 0, shared: 0b1111 };

    /// A reader: nobody need stop writing for it (what it sees is its own risk, as with `qemu-io -r`).
    pub const READER: Permissions = Permissions { used: 0b0001, shared: 0b1111 };

    /// A disk in use: read and written here, read but neither written nor resized by others.
    pub const USER: Permissions = Permissions { used: 0b0011, shared: 0b0101 };

    /// The source of a job on an image that nobody writes: read here, not written by others.
    pub const STABLE_READER: Permissions = Permissions { used: 0b0001, shared: 0b0101 };

    /// The target of a job: written and resized here; nobody else may rely on what it reads.
    pub const JOB_TARGET: Permissions = Permissions { used: 0b1010, shared: 0b0000 };

    /// A layer whose data a job moves down, under those above it: nobody else may rely on what it reads there.
    pub const JOB_LAYER: Permissions = Permissions { used: 0b0001, shared: 0b0100 };

    /// The layer that a job writes into, below those in use: read, written and resized here, read by others.
    pub const JOB_BASE: Permissions = Permissions { used: 0b1011, shared: 0b0101 };

    /// The layer that a job fills with what its readers see already.
    pub const JOB_TOP: Permissions = Permissions { used: 0b0101, shared: 0b0101 };

    /// What these come to for the file that holds an image with tables of its own: whoever reads or writes
    /// the disk reads tables, which must not change meanwhile; whoever writes it lets the file grow.
    pub fn for_image(self) -> Permissions {
        if self.used == 0 {
            return self;
        }
        let write = self.uses(Permission::Write) || self.uses(Permission::WriteUnchanged);
        let resize = if write { Permission::Write.bit() | Permission::Resize.bit() } else { 0 };
        let changes = Permission::Write.bit() | Permission::Resize.bit();
        Permissions { used: self.used | resize, shared: self.shared & !changes }
    }

    /// The same for an image that is open to be read only: its tables must not change, and nothing else is taken.
    pub fn of_tables(self) -> Permissions {
        let changes = Permission::Write.bit() | Permission::Resize.bit();
        Permissions { shared: self.shared & !changes, ..self }
    }

    /// Whether the permission is used.
    pub fn uses(self, permission: Permission) -> bool {
        self.used & permission.bit() != 0
    }

    /// Whether others may have it.
    pub fn shares(self, permission: Permission) -> bool {
        self.shared & permission.bit() != 0
    }

    /// Whether two users with these get along: what either takes, the other shares.
    pub fn agree_with(self, other: Permissions) -> bool {
        self.used & !other.shared == 0 && other.used & !self.shared == 0
    }

    /// Both users side by side: what either uses is used, what either denies is denied.
    pub fn and(self, other: Permissions) -> Permissions {
        Permissions { used: self.used | other.used, shared: self.shared & other.shared }
    }
}
