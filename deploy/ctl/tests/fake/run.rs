//! Runs the program, and looks at what it says while it runs.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A run of `coloctl`.
pub struct Run {
    child: Child,
    pub stdin: Option<ChildStdin>,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
}

impl Run {
    /// Starts it with these nodes and words.
    pub fn start(nodes: &[String], line: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coloctl"));
        command.env_remove("COLO_NODES");
        for node in nodes {
            command.args(["--node", node]);
        }
        command.args(line.split(' '));
        Self::spawn(command)
    }

    /// Starts it at a terminal, whose keys are `stdin` and whose screen is `out`; by util-linux' `script`.
    pub fn at_terminal(nodes: &[String], line: &str) -> Self {
        let nodes: String = nodes.iter().map(|node| format!("--node {node} ")).collect();
        let program = env!("CARGO_BIN_EXE_coloctl");
        let mut command = Command::new("script");
        command.args(["-qefc", &format!("'{program}' {nodes}{line}"), "/dev/null"]);
        Self::spawn(command)
    }

    /// Starts it with an output that takes nothing.
    pub fn unread(nodes: &[String], line: &str) -> Self {
        let nodes: String = nodes.iter().map(|node| format!("--node {node} ")).collect();
        let program = env!("CARGO_BIN_EXE_coloctl");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec '{program}' {nodes}{line} >/dev/full")]);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = collect(child.stdout.take().unwrap());
        let err = collect(child.stderr.take().unwrap());
        Self { stdin: child.stdin.take(), child, out, err }
    }

    pub fn say(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(bytes).and_then(|()| stdin.flush()).unwrap();
    }

    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.out.lock().unwrap()).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.err.lock().unwrap()).into_owned()
    }

    /// Waits for it to end; its status, output and messages.
    pub fn end(mut self) -> (i32, String, String) {
        let mut status = None;
        wait_for("the end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        // The collectors hold what the pipes held.
        wait_for("its last words", || Arc::strong_count(&self.out) == 1 && Arc::strong_count(&self.err) == 1);
        (status.unwrap().code().unwrap_or(-1), self.out(), self.err())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&all);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            into.lock().unwrap().extend(&buffer[..count]);
        }
    });
    all
}

/// Waits until something is so.
pub fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs it to its end.
pub fn run(nodes: &[String], line: &str) -> (i32, String, String) {
    let mut run = Run::start(nodes, line);
    run.stdin = None;
    run.end()
}
