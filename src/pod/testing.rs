//! What the tests of this folder share: times, instances, a Pod's record.

use jiff::Timestamp;

use super::model::{Admission, Exit, Instance, Observed, Sandbox};

/// So many seconds after the tests' zero hour.
pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

/// A running instance.
pub(super) fn instance(id: &str, attempt: u32, started_at: Timestamp) -> Instance {
    Instance {
        id: id.to_owned(),
        attempt,
        requested_image: "image".to_owned(),
        image: "image".to_owned(),
        image_id: "image".to_owned(),
        started_at: Some(started_at),
        post_started: true,
        stop: None,
        exit: None,
        user: None,
        resources: None,
        resizing: false,
    }
}

/// The container's newest instance ends.
pub(super) fn end(observed: &mut Observed, name: &str, code: i32, finished_at: Timestamp) {
    let instance = observed.containers.get_mut(name).and_then(|facts| facts.current.as_mut()).unwrap();
    instance.exit = Some(Exit {
        id: instance.id.clone(),
        code,
        signal: 0,
        reason: if code == 0 { "Completed" } else { "Error" }.to_owned(),
        message: String::new(),
        started_at: instance.started_at,
        finished_at: Some(finished_at),
    });
}

/// An admitted Pod whose containers may start.
pub(super) fn ready() -> Observed {
    Observed {
        admission: Some(Admission::Admitted),
        sandbox: Sandbox::Ready,
        volumes_mounted: true,
        start_time: Some(at(0)),
        ..Observed::default()
    }
}
