"""What watchd is compared with, each a script that runs as a process of its own."""
