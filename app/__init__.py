"""What a person or a program uses: command line, terminal chat, benchmark."""
