//! Hugepages.

use std::fs;

use crate::kernel::Behaviour;
use crate::machine::{Machine, same};

const NODE: &str = "sys/devices/system/node/node";

fn pages(machine: &Machine, node: u32, size: &str) -> u64 {
    let text = machine.read(&format!("{NODE}{node}/hugepages/hugepages-{size}/nr_hugepages"));
    text.trim().parse().unwrap()
}

#[test]
fn hugepages_are_spread_and_taken_back_where_they_were() {
    let machine = Machine::new();
    // Another program has some on one node.
    machine.write(&format!("{NODE}1/hugepages/hugepages-2048kB/nr_hugepages"), "10\n");
    machine.run("status").succeeded();
    let before = machine.snapshot();
    machine.run("hugepages 1G").succeeded().says("there are 512 now (1024 MiB; before: 10)").says("mounted here");
    assert_eq!([pages(&machine, 0, "2048kB"), pages(&machine, 1, "2048kB")], [256, 256]);
    assert!(machine.commands().contains("mount -t hugetlbfs -o pagesize=2M vhost-blk"), "{}", machine.commands());
    let after = machine.snapshot();
    for words in ["hugepages 1G", "hugepages 512M", "hugepages 1024MiB"] {
        machine.run(words).succeeded().says("there are 512 already").says("are reached by /dev/hugepages");
        same(&after, &machine.snapshot());
    }
    // More of them later: what was there before the first time counts.
    machine.run("hugepages 2G").succeeded().says("there are 1024 now");
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn one_node_and_large_pages() {
    let machine = Machine::new();
    let before = machine.snapshot();
    machine.run("hugepages 1025M --node 1 --page 1G").succeeded().says("there are 2 now");
    assert_eq!([pages(&machine, 0, "1048576kB"), pages(&machine, 1, "1048576kB")], [0, 2]);
    assert_eq!(machine.read("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"), "2\n");
    assert!(machine.commands().contains("pagesize=1G"), "{}", machine.commands());
    machine.run("hugepages 3M --node 0").succeeded().says("there are 2 now");
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
    machine.is_refused("hugepages 1G --node 7", &["no NUMA node 7", "0 1"]);
    for pool in ["sys/kernel/mm", "sys/devices/system/node/node0", "sys/devices/system/node/node1"] {
        fs::remove_dir_all(machine.path(&format!("{pool}/hugepages/hugepages-1048576kB"))).unwrap();
    }
    let machine_without = machine;
    let output = machine_without.run("hugepages 1G --page 1G");
    output.refused(&["no pages of that size", "there are: 2M"]);
}

/// A machine with pages of 64 KiB has other sizes of hugepages.
#[test]
fn pages_of_any_size_that_the_kernel_has() {
    let machine = Machine::with(Behaviour { larger_page: "524288kB", ..Behaviour::default() });
    machine.run("hugepages 1G --node 1 --page 512M").succeeded().says("there are 2 now");
    assert_eq!(pages(&machine, 1, "524288kB"), 2);
    machine.run("hugepages 1G --page 32M").refused(&["no pages of that size", "there are: 2M 512M"]);
}

#[test]
fn more_than_there_is_is_refused() {
    let machine = Machine::new();
    machine.is_refused("hugepages 6G", &["6144 MiB more are wanted", "6144 MiB of memory are available"]);
    machine.is_refused("hugepages 7T", &["ask for less"]);
}

#[test]
fn fewer_than_asked_for_is_a_failure_that_says_what_to_do() {
    let machine = Machine::with(Behaviour { most_pages: 100, ..Behaviour::default() });
    machine.cat_waits_for_the_kernel();
    let before = machine.snapshot();
    let parts = ["gave 200 of 512 pages", "fragmented", "hugepagesz=2M hugepages=512"];
    machine.run("hugepages 1G").refused(&parts);
    let output = machine.run("hugepages 1G --node 1");
    output.refused(&["gave 0 of 412 pages, there are 100 now", "hugepagesz=2M hugepages=1:512"]);
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn pages_in_use_stay_recorded() {
    let machine = Machine::new();
    machine.cat_waits_for_the_kernel();
    let before = machine.snapshot();
    machine.run("hugepages 1G").succeeded();
    machine.behave(|behaviour| behaviour.used_pages = 7);
    machine.run("undo").refused(&["7 hugepages are left instead of 0", "stop the guests"]);
    machine.behave(|behaviour| behaviour.used_pages = 0);
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn a_user_gets_a_mount_of_its_own() {
    let machine = Machine::new();
    machine.append(
        "proc/self/mountinfo",
        "29 22 0:29 / /dev/hugepages rw,relatime - hugetlbfs hugetlbfs rw,pagesize=2M\n",
    );
    let before = machine.snapshot();
    machine.run("hugepages 512M").succeeded().says("are reached by /dev/hugepages");
    machine.run("hugepages 512M --user daemon").succeeded().says("/run/hugepages/daemon-2M");
    let commands = machine.commands();
    assert!(commands.contains("pagesize=2M,uid=1,gid=1,mode=0700 vhost-blk"), "{commands}");
    let after = machine.snapshot();
    machine.run("hugepages 512M --user daemon").succeeded().says("is mounted already");
    same(&after, &machine.snapshot());
    // Still in use: kept, with everything that came before it.
    fs::write(machine.beside("busy"), "").unwrap();
    machine.run("undo").refused(&["target is busy", "still recorded"]);
    fs::remove_file(machine.beside("busy")).unwrap();
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
    // The place of another size is taken: it gets a name of its own.
    machine.run("hugepages 1G --page 1G").succeeded().says("/dev/hugepages-1G");
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}
