"""The command `engram-kernels`: one file per subcommand, arguments and what is printed."""
