//! A vhost-user-blk target that joins a guest's virtqueue to an NVMe queue pair.
