from autosam3d.cli.main import main

if __name__ == "__main__":
    main()
