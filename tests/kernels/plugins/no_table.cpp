// Some other library under the plug-in's name.
extern "C" int troupe_something_else() { return 1; }
