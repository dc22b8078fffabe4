//! A node's process: started with its output in a file, stopped by signals, ended on drop.

use anyhow::{Context, bail, ensure};
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(5);
/// Bytes of a log that a message shows.
const TAIL: usize = 3000;

/// A program of the workspace: beside this one, or beside the directory of test programs.
///
/// # Errors
/// It is not built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("this program's own path is not known")?;
    let beside = this.parent().into_iter().chain(this.parent().and_then(Path::parent));
    let found = beside.map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built: run `make build`"))
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output added to `log`. It ends with the thread that starts it at the latest: a harness
    /// that is killed leaves no nodes behind, nor the network that they are in.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write {}", log.display());
        let out = File::options().create(true).append(true).open(log).with_context(cannot)?;
        let err = out.try_clone().with_context(cannot)?;
        // SAFETY: between fork and exec only calls that are safe in a signal handler are allowed; prctl is one.
        unsafe { command.pre_exec(end_with_parent) };
        let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn();
        let child = child.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The system refuses.
    pub fn signal(&self, signal: libc::c_int) -> anyhow::Result<()> {
        let pid = libc::pid_t::try_from(self.child.id())?;
        // SAFETY: the child is not waited for before this value is dropped or borrowed mutably, so its id is its own.
        let sent = unsafe { libc::kill(pid, signal) };
        ensure!(sent == 0, "signal {signal} to process {pid}: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Kills it, as a loss of its host would, and waits until it is gone.
    ///
    /// # Errors
    /// It had ended by itself before.
    pub fn kill(&mut self) -> anyhow::Result<Instant> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the process had ended before it was killed: {status}; its log ends:\n{}", self.tail());
        }
        self.child.kill()?;
        let killed = Instant::now();
        let status = self.child.wait()?;
        ensure!(
            status.signal() == Some(libc::SIGKILL),
            "the process ended by itself: {status}; its log ends:\n{}",
            self.tail()
        );
        Ok(killed)
    }

    /// Its status, if it has ended.
    ///
    /// # Errors
    /// The system refuses.
    pub fn status(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn ended(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                started.elapsed() < limit,
                "still running after {limit:?}; its log ends:\n{}",
                self.tail()
            );
            std::thread::sleep(POLL);
        }
    }

    /// Bytes of memory that it uses beside the guest's, which is shared with nobody and yet counts as shared memory.
    ///
    /// # Errors
    /// It has ended.
    pub fn own_memory(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let kib = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            number.with_context(|| format!("no {key} in {path}: has the process ended?"))
        };
        Ok(kib("VmRSS:")?.saturating_sub(kib("RssShmem:")?) << 10)
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        tail(&self.log)
    }
}

fn end_with_parent() -> std::io::Result<()> {
    // SAFETY: the request takes a number and touches no memory.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The end of a log.
pub(super) fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL)..]).into_owned()
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL ends a stopped process too. One that has ended already is no error here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
