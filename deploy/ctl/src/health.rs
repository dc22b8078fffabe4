//! `coloctl health`: for probes, which look at the exit status alone.

use colo_proto::v1::{HealthReply, HealthRequest};
use serde::Serialize;
use std::process::ExitCode;

use crate::args::Health;
use crate::connect::{Nodes, QUESTION_LIMIT};
use crate::error::CtlError;
use crate::format::clean;
use crate::output::{print, print_json};

/// Status of the program when something is not as it should be.
const NOT_HEALTHY: u8 = 4;
/// Problems shown of one node: more make nothing clearer.
const MAX_PROBLEMS: usize = 20;

#[derive(Serialize)]
struct Answer {
    /// Every node answers and does its part.
    healthy: bool,
    /// Every node of the vm says that it is protected; spares have no say in it.
    protected: bool,
    nodes: Vec<Node>,
}

#[derive(Serialize)]
struct Node {
    address: String,
    answers: bool,
    healthy: bool,
    protected: bool,
    /// It is bound to no vm.
    spare: bool,
    problems: Vec<String>,
}

/// Asks all nodes.
pub(crate) async fn run(nodes: &Nodes, options: &Health) -> Result<ExitCode, CtlError> {
    let mut seen = Vec::new();
    let mut failures = Vec::new();
    for address in nodes.addresses() {
        let reply = async {
            let node = nodes.connect(address).await?;
            let mut client = node.client.clone();
            node.answer(QUESTION_LIMIT, client.health(HealthRequest {})).await
        };
        let reply = reply.await;
        failures.extend(reply.as_ref().err().map(|e| format!("{address} ({})", e.brief())));
        seen.push(node(address.to_string(), reply));
    }
    let answer = Answer {
        healthy: seen.iter().all(|node| node.healthy),
        protected: !seen.iter().all(|node| node.spare)
            && seen.iter().all(|node| node.protected || node.spare),
        nodes: seen,
    };
    if options.shape.json {
        print_json(&answer)?;
    }
    if failures.len() == nodes.addresses().len() {
        return Err(CtlError::NoneAnswers { found: failures, tls: nodes.is_secured() });
    }
    if !options.shape.json {
        print(&lines(&answer))?;
    }
    let good = answer.healthy && (answer.protected || !options.protected);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(NOT_HEALTHY) })
}

fn node(address: String, reply: Result<HealthReply, CtlError>) -> Node {
    match reply {
        Ok(HealthReply { healthy, protected, problems, spare }) => {
            let problems = problems.iter().take(MAX_PROBLEMS).map(|problem| clean(problem)).collect();
            Node { address, answers: true, healthy, protected, spare, problems }
        }
        Err(e) => {
            let problems = vec![e.to_string()];
            Node { address, answers: false, healthy: false, protected: false, spare: false, problems }
        }
    }
}

fn lines(answer: &Answer) -> String {
    let mut text = String::new();
    for node in &answer.nodes {
        let health = match (node.answers, node.healthy) {
            (false, _) => "no answer",
            (true, true) => "healthy",
            (true, false) => "NOT HEALTHY",
        };
        let protection = match (node.answers, node.protected) {
            (false, _) => "",
            (true, _) if node.spare => ", a spare for any vm that needs it",
            (true, true) => ", protected",
            (true, false) => ", not protected",
        };
        text.push_str(&format!("{}: {health}{protection}\n", node.address));
        for problem in &node.problems {
            text.push_str(&format!("  {problem}\n"));
        }
    }
    text
}
