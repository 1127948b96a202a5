"""Pure geometry that clients, servers, readers and the coordinator share: the same spec, the same layout everywhere."""
