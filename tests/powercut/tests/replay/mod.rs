//! Files as a power cut may leave them, from the record of what was done to them.
//!
//! Two things are kept of each file and name: what is certain, because it was synced, and what has been done since. A
//! cut keeps an arbitrary part of the latter: whole writes or the beginning of one, in any combination, and any names,
//! or, as a journal does it, the names up to some instant.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The kinds of records. The recorder's crate itself may not be linked here: its functions would take the place of
/// libc's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Open,
    Close,
    Write,
    Truncate,
    Sync,
    Rename,
    Unlink,
    Link,
    Mkdir,
    Rmdir,
    Punch,
}

impl Kind {
    /// In the order of their numbers, from 1.
    const ALL: [Self; 11] = [
        Self::Open,
        Self::Close,
        Self::Write,
        Self::Truncate,
        Self::Sync,
        Self::Rename,
        Self::Unlink,
        Self::Link,
        Self::Mkdir,
        Self::Rmdir,
        Self::Punch,
    ];
}

const HEADER: usize = 21;

/// One thing that was done.
#[derive(Clone, Debug)]
pub(crate) struct Record<'a> {
    kind: Kind,
    fd: i32,
    offset: u64,
    first: &'a [u8],
    second: &'a [u8],
}

/// All records of a log; its last may be cut short.
pub(crate) fn records(mut log: &[u8]) -> Vec<Record<'_>> {
    let mut records = Vec::new();
    while log.len() >= HEADER {
        let number = |at: usize| u32::from_le_bytes(log[at..at + 4].try_into().unwrap());
        let (first, second) = (number(13) as usize, number(17) as usize);
        if log.len() < HEADER + first + second {
            break;
        }
        records.push(Record {
            kind: Kind::ALL[usize::from(log[0]) - 1],
            fd: number(1) as i32,
            offset: u64::from_le_bytes(log[5..13].try_into().unwrap()),
            first: &log[HEADER..HEADER + first],
            second: &log[HEADER + first..HEADER + first + second],
        });
        log = &log[HEADER + first + second..];
    }
    records
}

type NodeId = usize;

#[derive(Clone, Debug)]
enum Edit {
    Write(u64, Vec<u8>),
    Truncate(u64),
    Punch(u64, u64),
}

#[derive(Clone, Debug)]
enum Node {
    File { certain: Vec<u8>, edits: Vec<Edit> },
    Dir { certain: BTreeMap<String, NodeId>, live: BTreeMap<String, NodeId> },
}

/// Names that appear or go in one step: directory, name, what it names then.
type Renaming = Vec<(NodeId, String, Option<NodeId>)>;

/// Files below one directory, through a run.
pub(crate) struct Files {
    root: PathBuf,
    nodes: Vec<Node>,
    names: Vec<Renaming>,
    open: BTreeMap<i32, NodeId>,
}

impl Files {
    /// An empty directory.
    pub(crate) fn new(root: &Path) -> Self {
        let top = Node::Dir { certain: BTreeMap::new(), live: BTreeMap::new() };
        Self { root: root.to_owned(), nodes: vec![top], names: Vec::new(), open: BTreeMap::new() }
    }

    /// Does one step; answers what it wrote, if it wrote to the file `watched` right below the root.
    pub(crate) fn step<'a>(&mut self, record: &Record<'a>, watched: &str) -> Option<&'a [u8]> {
        let path = |bytes: &[u8]| PathBuf::from(String::from_utf8(bytes.to_vec()).unwrap());
        match record.kind {
            Kind::Open => self.open(record.fd, record.offset as i32, &path(record.first)),
            Kind::Close => drop(self.open.remove(&record.fd)),
            Kind::Write => {
                let node = self.open[&record.fd];
                self.edit(node, Edit::Write(record.offset, record.first.to_vec()));
                return (self.find(&self.root.join(watched)) == Some(node)).then_some(record.first);
            }
            Kind::Truncate => self.edit(self.open[&record.fd], Edit::Truncate(record.offset)),
            Kind::Punch => {
                let len = u64::from_le_bytes(record.first.try_into().unwrap());
                self.edit(self.open[&record.fd], Edit::Punch(record.offset, len));
            }
            Kind::Sync => self.sync(self.open[&record.fd]),
            Kind::Rename => {
                let (from, to) = (path(record.first), path(record.second));
                let node = self.find(&from);
                self.name(vec![(from, None), (to, node)]);
            }
            Kind::Link => {
                let node = self.find(&path(record.first));
                self.name(vec![(path(record.second), node)]);
            }
            Kind::Unlink | Kind::Rmdir => self.name(vec![(path(record.first), None)]),
            Kind::Mkdir => {
                self.nodes.push(Node::Dir { certain: BTreeMap::new(), live: BTreeMap::new() });
                self.name(vec![(path(record.first), Some(self.nodes.len() - 1))]);
            }
        }
        None
    }

    /// What a cut now may leave, put into `into`.
    pub(crate) fn cut(&self, rng: &mut impl FnMut(u64) -> u64, into: &Path) {
        let mut dirs: BTreeMap<NodeId, BTreeMap<String, NodeId>> = BTreeMap::new();
        for (id, node) in self.nodes.iter().enumerate() {
            if let Node::Dir { certain, .. } = node {
                dirs.insert(id, certain.clone());
            }
        }
        let journal = rng(2) == 0;
        let upto = rng(self.names.len() as u64 + 1) as usize;
        for (at, renaming) in self.names.iter().enumerate() {
            if if journal { at < upto } else { rng(2) == 0 } {
                renaming.iter().for_each(|(dir, name, node)| set(dirs.get_mut(dir).unwrap(), name, *node));
            }
        }
        self.build(0, &dirs, rng, into);
    }

    fn build(
        &self,
        dir: NodeId,
        dirs: &BTreeMap<NodeId, BTreeMap<String, NodeId>>,
        rng: &mut impl FnMut(u64) -> u64,
        into: &Path,
    ) {
        fs::create_dir_all(into).unwrap();
        for (name, &node) in &dirs[&dir] {
            match &self.nodes[node] {
                Node::Dir { .. } => self.build(node, dirs, rng, &into.join(name)),
                Node::File { certain, edits } => {
                    fs::write(into.join(name), torn(certain, edits, rng)).unwrap();
                }
            }
        }
    }

    fn open(&mut self, fd: i32, flags: i32, path: &Path) {
        let node = match self.find(path) {
            Some(node) => {
                if flags & libc::O_TRUNC != 0 {
                    self.edit(node, Edit::Truncate(0));
                }
                node
            }
            None => {
                // Also what existed before, or was made by a call that is not recorded: RocksDB's diary.
                self.nodes.push(Node::File { certain: Vec::new(), edits: Vec::new() });
                self.name(vec![(path.to_owned(), Some(self.nodes.len() - 1))]);
                self.nodes.len() - 1
            }
        };
        self.open.insert(fd, node);
    }

    fn edit(&mut self, node: NodeId, edit: Edit) {
        if let Node::File { edits, .. } = &mut self.nodes[node] {
            edits.push(edit);
        }
    }

    fn sync(&mut self, node: NodeId) {
        match &mut self.nodes[node] {
            Node::File { certain, edits } => {
                edits.drain(..).for_each(|edit| apply(certain, &edit, usize::MAX));
            }
            Node::Dir { .. } => {
                let of_dir = |renaming: &Renaming| renaming.iter().any(|(dir, ..)| *dir == node);
                let (synced, rest) = std::mem::take(&mut self.names).into_iter().partition(of_dir);
                self.names = rest;
                let synced: Vec<Renaming> = synced;
                for (dir, name, named) in synced.into_iter().flatten() {
                    let Node::Dir { certain, .. } = &mut self.nodes[dir] else { unreachable!() };
                    set(certain, &name, named);
                }
            }
        }
    }

    fn name(&mut self, changes: Vec<(PathBuf, Option<NodeId>)>) {
        let mut renaming = Renaming::new();
        for (path, node) in changes {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let Some(dir) = self.find(parent) else { continue };
            let name = name.to_str().unwrap().to_owned();
            let Node::Dir { live, .. } = &mut self.nodes[dir] else { panic!("{path:?} is below a file") };
            set(live, &name, node);
            renaming.push((dir, name, node));
        }
        self.names.push(renaming);
    }

    fn find(&self, path: &Path) -> Option<NodeId> {
        let below = path.strip_prefix(&self.root).ok()?;
        below.components().try_fold(0, |dir, name| match &self.nodes[dir] {
            Node::Dir { live, .. } => live.get(name.as_os_str().to_str()?).copied(),
            Node::File { .. } => None,
        })
    }
}

fn set(dir: &mut BTreeMap<String, NodeId>, name: &str, node: Option<NodeId>) {
    match node {
        Some(node) => drop(dir.insert(name.to_owned(), node)),
        None => drop(dir.remove(name)),
    }
}

/// The content with some of the edits: all, none, the first few and a part of the next, or any.
fn torn(certain: &[u8], edits: &[Edit], rng: &mut impl FnMut(u64) -> u64) -> Vec<u8> {
    let mut bytes = certain.to_vec();
    match rng(4) {
        0 => {}
        1 => edits.iter().for_each(|edit| apply(&mut bytes, edit, usize::MAX)),
        2 => {
            let whole = rng(edits.len() as u64 + 1) as usize;
            edits[..whole].iter().for_each(|edit| apply(&mut bytes, edit, usize::MAX));
            if let Some(edit @ Edit::Write(_, data)) = edits.get(whole) {
                apply(&mut bytes, edit, rng(data.len() as u64 + 1) as usize);
            }
        }
        _ => edits.iter().filter(|_| rng(2) == 0).for_each(|edit| apply(&mut bytes, edit, usize::MAX)),
    }
    bytes
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit, most: usize) {
    match edit {
        Edit::Write(offset, data) => {
            let (start, data) = (*offset as usize, &data[..data.len().min(most)]);
            if bytes.len() < start + data.len() {
                bytes.resize(start + data.len(), 0);
            }
            bytes[start..start + data.len()].copy_from_slice(data);
        }
        Edit::Punch(offset, len) => {
            let end = bytes.len().min((offset + len) as usize);
            bytes[end.min(*offset as usize)..end].fill(0);
        }
        Edit::Truncate(len) => bytes.resize(*len as usize, 0),
    }
}
