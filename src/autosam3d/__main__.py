from autosam3d.cli import main

if __name__ == "__main__":
    main()
