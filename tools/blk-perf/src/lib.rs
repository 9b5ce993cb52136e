//! A vhost-user-blk load generator: the front-end of a virtual machine without the machine.
