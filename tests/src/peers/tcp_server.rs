//! A listening TCP socket with one thread per connection: what the TCP peers have in common.

use std::collections::HashMap;
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::port::bind_somewhere;

/// What a peer does with one connection, told its number; the connection is closed afterwards.
pub(super) type Serve = Arc<dyn Fn(u64, TcpStream) + Send + Sync>;

/// A TCP server that can stop and come back on the same port.
pub(super) struct TcpServer {
    address: SocketAddr,
    serve: Serve,
    shared: Arc<Shared>,
    running: Option<Running>,
}

#[derive(Debug, Default)]
struct Shared {
    ever: AtomicU64,
    open: Mutex<HashMap<u64, TcpStream>>,
}

#[derive(Debug)]
struct Running {
    listener: TcpListener,
    stopping: Arc<AtomicBool>,
    acceptor: JoinHandle<()>,
}

impl TcpServer {
    pub(super) fn start(serve: Serve) -> TcpServer {
        let (listener, port) = bind_somewhere(|port| TcpListener::bind(("127.0.0.1", port)));
        let mut server = TcpServer {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            serve,
            shared: Arc::default(),
            running: None,
        };
        server.run(listener);
        server
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn connections_open(&self) -> usize {
        lock(&self.shared.open).len()
    }

    pub(super) fn connections_ever(&self) -> u64 {
        self.shared.ever.load(Ordering::SeqCst)
    }

    /// Closes the listener and every connection.
    pub(super) fn stop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        running.stopping.store(true, Ordering::SeqCst);
        // On Linux this ends a blocked accept(2); it fails on no listening socket.
        let _ = rustix::net::shutdown(&running.listener, rustix::net::Shutdown::Both);
        let _ = running.acceptor.join();
        drop(running.listener);
        for connection in lock(&self.shared.open).values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Listens again on the same port.
    pub(super) fn restart(&mut self) {
        assert!(self.running.is_none(), "the peer still runs");
        let listener = TcpListener::bind(self.address).expect("the peer's port is still free");
        self.run(listener);
    }

    fn run(&mut self, listener: TcpListener) {
        let stopping = Arc::new(AtomicBool::new(false));
        let acceptor = {
            let listener = listener.try_clone().expect("a socket can be duplicated");
            let (shared, serve) = (Arc::clone(&self.shared), Arc::clone(&self.serve));
            let stopping = Arc::clone(&stopping);
            thread::spawn(move || accept_all(&listener, &stopping, &shared, &serve))
        };
        self.running = Some(Running { listener, stopping, acceptor });
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_all(listener: &TcpListener, stopping: &AtomicBool, shared: &Arc<Shared>, serve: &Serve) {
    while !stopping.load(Ordering::SeqCst) {
        let Ok((connection, _)) = listener.accept() else {
            continue;
        };
        let number = shared.ever.fetch_add(1, Ordering::SeqCst);
        let Ok(registered) = connection.try_clone() else {
            continue;
        };
        lock(&shared.open).insert(number, registered);
        let (shared, serve) = (Arc::clone(shared), Arc::clone(serve));
        thread::spawn(move || {
            // The registered duplicate keeps the connection open until serve is done with it.
            serve(number, connection);
            lock(&shared.open).remove(&number);
        });
    }
}

/// Whether [`TcpServer::stop`] has shut a connection that nobody reads: sending nothing fails then.
pub(super) fn is_stopped(mut connection: &TcpStream) -> bool {
    connection.write(b"").is_err()
}

/// A panic of one connection's thread is that test's own failure, not the lock's.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
