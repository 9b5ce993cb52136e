//! A namespace that changes under a front-end: lanes check against its new size, and the guest hears of it.
//!
//! This module owns the channel on which we speak unasked. A front-end that does not read it keeps nobody waiting.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::Session;
use super::error::ChannelError;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG (vhost-user, "Back-end message types").
const CONFIG_CHANGED: u32 = 2;
/// The protocol's version, in the header's flags. A reply is not asked for: nothing would be done about a "no".
const FLAGS: u32 = 1;

/// The channel on which we may speak unasked.
#[derive(Default)]
pub(super) struct BackChannel {
    offered: Option<OwnedFd>,
    open: Option<OwnedFd>,
}

impl BackChannel {
    /// What comes with the next message; not in use before that is accepted.
    pub(super) fn offer(&mut self, descriptor: Option<OwnedFd>) {
        self.offered = descriptor;
    }

    /// The message was in order.
    pub(super) fn accept(&mut self) {
        self.open = self.offered.take();
    }

    /// Tells the front-end that the configuration space has changed. The error says why it cannot be told.
    fn config_changed(&mut self) -> Result<(), ChannelError> {
        let channel = self.open.as_ref().ok_or(ChannelError::NotOpened)?;
        // A header without a body.
        let message = [CONFIG_CHANGED, FLAGS, 0].map(u32::to_ne_bytes).concat();
        match send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => Ok(()),
            // It has not read what it was told before, which says the same.
            Err(Errno::AGAIN) => Ok(()),
            Ok(_) => {
                self.open = None;
                Err(ChannelError::Partial)
            }
            Err(error) => {
                self.open = None;
                Err(ChannelError::Send(error))
            }
        }
    }
}

impl Session {
    /// Takes over what has become of the namespace since the last time.
    pub(super) fn take_news(&mut self) {
        let known = self.export.known();
        if known == self.known {
            return;
        }
        let resized = known.namespace.blocks != self.known.namespace.blocks;
        self.known = known;
        self.negotiate(self.features);
        for running in self.running.values() {
            if let Err(error) = running.handle.set_disk(self.disk.clone()) {
                // Its rings are not served any more.
                log::error!("{}: a ring cannot be told of the change of its namespace: {error}", self.export.name);
            }
        }
        if resized {
            self.tell_config_changed();
        }
    }

    fn tell_config_changed(&mut self) {
        let name = &self.export.name;
        let needed = VhostUserProtocolFeatures::BACKEND_REQ.union(VhostUserProtocolFeatures::CONFIG).bits();
        let told = match self.protocol_features & needed == needed {
            true => self.back_channel.config_changed(),
            false => Err(ChannelError::NotNegotiated),
        };
        match told {
            Ok(()) => log::info!("{name}: the front-end was told of the new size"),
            Err(why) => log::warn!(
                "{name}: cannot tell the front-end of the new size: {why}; its guest sees it after a restart"
            ),
        }
    }
}
