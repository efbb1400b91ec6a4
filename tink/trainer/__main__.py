from tink.trainer.process import main

raise SystemExit(main())
