//! A service for tests of the clients: right but for the faults that it is told to have.

use std::collections::HashMap;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::Dial;
use super::history::Op;
use super::linear::apply;
use super::resp::{Reply, read_reply};

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is lost with its connection.
    Lost,
    /// It is done, and the reply is lost with the connection.
    LostReply,
    /// It is done, and the reply never comes.
    Silent,
    /// It is refused.
    Refused,
    /// It is acknowledged as if it were done.
    Forgotten,
}

/// Ends with the process.
pub(super) struct Server {
    address: SocketAddr,
}

#[derive(Default)]
struct Store {
    values: HashMap<Vec<u8>, Option<Vec<u8>>>,
    requests: usize,
}

impl Server {
    /// The request with a fault's number, counted from 0 over all connections, has that fault.
    pub(super) fn start(faults: &[(usize, Fault)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (store, faults) = (Arc::<Mutex<Store>>::default(), faults.to_vec());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (store, faults) = (Arc::clone(&store), faults.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &store, &faults));
            }
        });
        Self { address }
    }

    pub(super) fn dial(&self) -> Dial {
        let address = self.address;
        Arc::new(move || Ok(TcpStream::connect(address)?))
    }
}

fn serve(stream: TcpStream, store: &Mutex<Store>, faults: &[(usize, Fault)]) {
    let mut stream = BufReader::new(stream);
    while let Ok(Reply::Array(words)) = read_reply(&mut stream, true) {
        let words: Vec<Vec<u8>> = words.into_iter().map(word).collect();
        let mut store = store.lock().unwrap();
        let fault = faults.iter().find(|(number, _)| *number == store.requests).map(|(_, fault)| *fault);
        store.requests += 1;
        let reply = match fault {
            Some(Fault::Lost) => return,
            Some(Fault::Refused) => Reply::Error("MISCONF not now".to_owned()),
            Some(Fault::Forgotten) => answer(&mut store.values.clone(), &words),
            _ => answer(&mut store.values, &words),
        };
        drop(store);
        match fault {
            Some(Fault::LostReply) => return,
            Some(Fault::Silent) => {}
            _ => stream.get_mut().write_all(encode(&reply).as_bytes()).unwrap(),
        }
    }
}

fn word(reply: Reply) -> Vec<u8> {
    let Reply::Bulk(Some(bytes)) = reply else { panic!("{reply:?} in a request") };
    bytes
}

fn answer(values: &mut HashMap<Vec<u8>, Option<Vec<u8>>>, words: &[Vec<u8>]) -> Reply {
    let argument = || words[2].clone();
    let op = match words[0].as_slice() {
        b"GET" => Op::Get,
        b"SET" => Op::Set(argument()),
        b"INCR" => Op::Incr,
        b"APPEND" => Op::Append(argument()),
        b"MGET" => {
            let read = |key| Reply::Bulk(values.get(key).cloned().flatten());
            return Reply::Array(words[1..].iter().map(read).collect());
        }
        other => panic!("{other:?} is not asked for"),
    };
    apply(values.entry(words[1].clone()).or_default(), &op)
}

fn encode(reply: &Reply) -> String {
    match reply {
        Reply::Status(text) => format!("+{text}\r\n"),
        Reply::Error(text) => format!("-{text}\r\n"),
        Reply::Integer(number) => format!(":{number}\r\n"),
        Reply::Bulk(None) => "$-1\r\n".to_owned(),
        Reply::Bulk(Some(value)) => format!("${}\r\n{}\r\n", value.len(), String::from_utf8_lossy(value)),
        Reply::Array(replies) => {
            let parts: String = replies.iter().map(encode).collect();
            format!("*{}\r\n{parts}", replies.len())
        }
    }
}
