"""What a drawn picture shows, read by classical vision, and whether that is what was asked for."""
