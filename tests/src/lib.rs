//! End-to-end tests: real front-ends and real guests against the target.
