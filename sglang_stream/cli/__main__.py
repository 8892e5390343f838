from sglang_stream.cli import main

main()
