//! Frames on a QUIC stream, for both nodes.

use bytes::{Bytes, BytesMut};
use colo_common::telemetry::one_line;
use colo_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind, VmTag};
use colo_proto::message::{Control, Message, MessageError};
use colo_vmm::PagePool;
use quinn::{RecvStream, SendStream};

/// Why a stream of frames ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection is gone.
    #[error("the connection is lost: {0}")]
    Lost(String),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What a frame says makes no sense.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The stream ended where a frame should go on.
    #[error("the peer closed the stream")]
    Closed,
}

/// Reads the next frame; nothing at the end of the stream. Pages and blocks are read to page boundaries, which makes copying
/// them on several times faster.
///
/// # Errors
/// The connection is lost, or what comes is no frame of this vm.
pub async fn read_frame(
    stream: &mut RecvStream,
    vm: VmTag,
    pool: &PagePool,
) -> Result<Option<Frame>, WireError> {
    let mut bytes = [0; HEADER_LEN];
    match stream.read_exact(&mut bytes).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(lost(&e)),
    }
    let header = Header::decode(&bytes)?;
    header.check_vm(vm)?;
    // The lengths were checked against the limits of their kind.
    let table = read_bytes(stream, header.table_len as usize).await?;
    let len = header.body_len as usize;
    let body = if matches!(header.kind, Kind::Pages | Kind::Blocks) && len > 0 {
        let mut buffer = pool.take(len.div_ceil(colo_common::PAGE_SIZE));
        let part = buffer.bytes_mut().get_mut(..len).ok_or(WireError::Closed)?;
        stream.read_exact(part).await.map_err(|e| lost(&e))?;
        Bytes::from_owner(buffer).slice(..len)
    } else {
        read_bytes(stream, len).await?
    };
    Ok(Some(Frame::received(header, table, body)?))
}

/// What an operation of a stream says is only that the connection is lost; why, its causes say.
fn lost(error: &dyn std::error::Error) -> WireError {
    WireError::Lost(one_line(error))
}

async fn read_bytes(stream: &mut RecvStream, len: usize) -> Result<Bytes, WireError> {
    let mut bytes = BytesMut::zeroed(len);
    stream.read_exact(&mut bytes).await.map_err(|e| lost(&e))?;
    Ok(bytes.freeze())
}

/// Writes a frame; answers its bytes on the wire.
///
/// # Errors
/// The connection is lost.
pub async fn write_frame(stream: &mut SendStream, frame: &Frame) -> Result<u64, WireError> {
    let head = frame.head();
    let bytes = (head.len() + frame.body().len()) as u64;
    let mut parts = [head, frame.body().clone()];
    stream.write_all_chunks(&mut parts).await.map_err(|e| lost(&e))?;
    Ok(bytes)
}

/// Writes a message of the control stream.
///
/// # Errors
/// The connection is lost.
pub async fn write_control<M: Message>(
    stream: &mut SendStream,
    vm: VmTag,
    message: &M,
) -> Result<(), WireError> {
    write_frame(stream, &Frame::control(vm, message)).await.map(drop)
}

/// Reads a message of the control stream.
///
/// # Errors
/// The connection is lost, the stream is over, or what comes is no such message.
pub async fn read_control(stream: &mut RecvStream, vm: VmTag, pool: &PagePool) -> Result<Control, WireError> {
    let frame = read_frame(stream, vm, pool).await?.ok_or(WireError::Closed)?;
    Ok(Control::decode(&frame)?)
}
