"""The only room that imports TVM's unstable names; `api` re-exports what the compiler uses."""
