"""Trajectories as parquet shards under a manifest, written and read, on disks and in stores."""
