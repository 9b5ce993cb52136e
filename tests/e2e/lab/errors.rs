//! Mistakes that users make, and what the programs say about them.
