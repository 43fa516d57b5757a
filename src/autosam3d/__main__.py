from autosam3d.cli import main

main()
