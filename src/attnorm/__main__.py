from attnorm.cli import main

main()
